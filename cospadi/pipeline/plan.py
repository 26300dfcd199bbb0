"""The plan of a run: which layers share a dictionary, and how each group is stored."""

from dataclasses import asdict, replace

from cospadi.allocation import Assignment, allocate, families_of, pair_distances, uniform_assignment
from cospadi.allocation import match_groups as match_by_distance
from cospadi.errors import CheckpointError
from cospadi.events import Planned, PlannedUnit
from cospadi.pipeline import workload
from cospadi.pipeline.job import Job
from cospadi.pipeline.measure_costs import correction_paths, measure_corrections, profile_groups, profile_paths
from cospadi.pipeline.records import Records
from cospadi.pipeline.setup import check_order
from cospadi.pipeline.stage_times import StageTimes


def match_groups(job: Job) -> Job:
    """Join groups to the pairs that lose least by sharing a dictionary, where the recipe asks for it.

    Raises
    ------
    UsageError
        Sequential calibration cannot take the pairs in turn.
    """
    if job.config.groups != "matching":
        return job
    model = job.model
    weights = {layer.name: model.source.matrix(layer.name) for layer in model.map.layers}
    grams, sensitivities = {}, {}
    for layer in model.map.layers:
        statistics = job.measurements[layer.source]
        assert statistics.gram is not None
        grams[layer.source] = statistics.gram
        sensitivities[layer.name] = statistics.squares(layer.name)
    distances = pair_distances(
        model.groups,
        weights,
        grams,
        sensitivities if job.config.needs_sensitivities else None,
        damping=job.config.damping,
    )
    groups = tuple(match_by_distance(model.groups, distances))
    check_order(job.config, groups)
    return replace(job, model=replace(model, groups=groups))


def plan_groups(job: Job, records: Records, times: StageTimes) -> Assignment:
    """Decide how each group is stored, note it in the records and tell of it.

    Raises
    ------
    CheckpointError
        An interrupted run had another plan.
    """
    plan = _assign(job, records, times)
    units = tuple(
        PlannedUnit(one.group.name, one.choice.kind, workload.of_plan(job.method, one)) for one in plan.groups
    )
    listed = [asdict(unit) for unit in units]
    if records.noted("plan") not in (None, listed):
        raise CheckpointError(
            f"{records.folder}: what was measured again gives another plan: delete it and start afresh"
        )
    records.note("plan", listed)
    n_factors = sum(one.choice.kind == "factors" for one in plan.groups)
    n_layers, solver = len(job.model.map.layers), job.method.solver_name
    job.tell(Planned(n_layers, len(plan.groups), n_factors, len(plan.dense), solver, job.reason, units))
    return plan


def _assign(job: Job, records: Records, times: StageTimes) -> Assignment:
    """Profile the groups, correct the profiles by solving samples, and allocate the bytes."""
    config, method, groups = job.config, job.method, job.model.groups
    if config.allocation == "uniform":
        records.note("profiles", [])
        records.note("corrections", [])
        return uniform_assignment(config, method, groups)
    families = families_of(config, method)
    records.note("profiles", profile_paths(job))
    with times.of("profiling"):
        profiles = profile_groups(job, families)
    records.note("corrections", correction_paths(job, families, profiles))
    with times.of("correcting"):
        corrections = measure_corrections(job, families, profiles)
    return allocate(config, method, families, groups, profiles, corrections)
