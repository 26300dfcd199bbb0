"""Profiles of all groups, and their corrections by solved samples, each durably kept."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

from cospadi.allocation import (
    SPARSE,
    Corrections,
    Factors,
    Families,
    GroupProfile,
    Method,
    Point,
    is_complete,
    profile_group,
)
from cospadi.errors import CheckpointError
from cospadi.events import Corrected, Profiled
from cospadi.executors import Task
from cospadi.formats import pack_group, unpack_group
from cospadi.models import Group
from cospadi.pipeline import workload
from cospadi.pipeline.approximate import Approximation, approximate, rounded, rounded_weight
from cospadi.pipeline.group_inputs import GroupInputs
from cospadi.pipeline.job import Job
from cospadi.recipe import CompressionConfig
from cospadi.solvers import HTP
from cospadi.whitening import Objective


@dataclass(frozen=True)
class Trial:
    """How every group is profiled and every sample solved.

    Attributes
    ----------
    config : CompressionConfig
        The recipe.
    families : Families
        What the recipe lets groups become.
    method : Method
        Solver, format and seed.
    """

    config: CompressionConfig
    families: Families
    method: Method

    @property
    def spectrum(self) -> bool:
        """Whether the allocation needs the singular values."""
        return self.config.allocation == "pooled-spectrum"

    def objective(self, group: Group, inputs: GroupInputs, device: str) -> Objective:
        """Give what approximations of the group are judged by."""
        return inputs.to(device).objective(self.config, group, self.config.cost_is_sensitivity)


def profile_groups(job: Job, families: Families) -> list[GroupProfile]:
    """Profile all groups, as far as earlier runs with the same weighting have not."""
    trial, groups, facts = Trial(job.config, families, job.method), job.model.groups, _weighting(job.config)
    profiles: dict[int, GroupProfile] = {}
    known: dict[int, GroupProfile | None] = {}
    work = [workload.profiling(g.in_features, g.out_features, families, trial.spectrum) for g in groups]

    def tell(resumed: bool = False) -> None:
        job.tell(Profiled(len(profiles), len(groups), resumed, work_done=_at(work, profiles), work_total=sum(work)))

    for index, group in enumerate(groups):
        found = known[index] = _kept(job, _name(group), facts, GroupProfile.from_json)
        if found is not None and is_complete(found, families, trial.spectrum):
            profiles[index] = found
            tell(resumed=True)
    pending = [index for index in range(len(groups)) if index not in profiles]
    if pending:
        tell()
    tasks = []
    for index in pending:
        run = partial(_profile, trial, groups[index], known[index])
        tasks.append(Task(groups[index].name, work[index], run, job.place.reader(groups[index])))
    for number, profile in job.place.executor.run(tasks):
        index = pending[number]
        job.measurements.keep_text(_name(groups[index]), facts, profile.to_json())
        profiles[index] = profile
        tell()
    return [profiles[index] for index in range(len(groups))]


def measure_corrections(job: Job, families: Families, profiles: Sequence[GroupProfile]) -> Corrections:
    """Solve the middle group of each kind at one size, and compare with what the profile says of it."""
    trial, groups = Trial(job.config, families, job.method), job.model.groups
    facts, middle = _correction_facts(job, families), _middle_of_kinds(profiles)
    samples = [groups[index] for index in middle.values()]
    work = [workload.correcting(g.in_features, g.out_features, families, job.method.solver) for g in samples]
    found: dict[int, Corrections] = {}

    def tell(resumed: bool = False) -> None:
        job.tell(Corrected(len(found), len(middle), resumed, work_done=_at(work, found), work_total=sum(work)))

    tasks, pending = [], []
    for number, (kind, index) in enumerate(middle.items()):
        kept = _kept(job, f"corrections-{kind}", facts, Corrections.from_json)
        if kept is not None:
            found[number] = kept
            tell(resumed=True)
            continue
        run = partial(_corrections, trial, samples[number], profiles[index])
        tasks.append(Task(samples[number].name, work[number], run, job.place.reader(samples[number])))
        pending.append((number, kind))
    if pending:
        tell()
    for done, corrections in job.place.executor.run(tasks):
        number, kind = pending[done]
        job.measurements.keep_text(f"corrections-{kind}", facts, corrections.to_json())
        found[number] = corrections
        tell()
    joined = Corrections()
    for number in range(len(middle)):
        for own, more in zip(vars(joined).values(), vars(found[number]).values(), strict=True):
            own.update(more)
    return joined


def _profile(trial: Trial, group: Group, known: GroupProfile | None, device: str, inputs: GroupInputs) -> GroupProfile:
    objective = trial.objective(group, inputs, device)
    return profile_group(objective, group.layers[0].kind, trial.families, trial.spectrum, known)


def _corrections(trial: Trial, group: Group, profile: GroupProfile, device: str, inputs: GroupInputs) -> Corrections:
    found = Corrections()
    _correct(found, trial, group, profile, trial.objective(group, inputs, device))
    return found


T = TypeVar("T")


def _kept(job: Job, name: str, facts: dict[str, Any], read: Callable[[str], T]) -> T | None:
    """Give what an earlier run kept under a name; what another version wrote counts as missing."""
    text = job.measurements.text(name, facts)
    try:
        return None if text is None else read(text)
    except CheckpointError:
        return None


def profile_paths(job: Job) -> list[str]:
    """Give where the profile of each group is kept once it is known."""
    facts = _weighting(job.config)
    return [str(job.measurements.text_path(_name(group), facts).absolute()) for group in job.model.groups]


def correction_paths(job: Job, families: Families, profiles: Sequence[GroupProfile]) -> list[str]:
    """Give where the corrections of each kind are kept once they are known."""
    facts = _correction_facts(job, families)
    kinds = _middle_of_kinds(profiles)
    return [str(job.measurements.text_path(f"corrections-{kind}", facts).absolute()) for kind in kinds]


def _correction_facts(job: Job, families: Families) -> dict[str, Any]:
    return {"families": asdict(families), "solver": repr(job.method), **_weighting(job.config)}


def _middle_of_kinds(profiles: Sequence[GroupProfile]) -> dict[str, int]:
    """Give the index of the middle group of each kind."""
    by_kind: dict[str, list[int]] = {}
    for index, profile in enumerate(profiles):
        by_kind.setdefault(profile.group_kind, []).append(index)
    return {kind: indices[len(indices) // 2] for kind, indices in by_kind.items()}


def _name(group: Group) -> str:
    return f"{group.name}-{len(group.layers)}"


def _at(work: Sequence[float], done: Iterable[int]) -> float:
    return sum(work[index] for index in done)


def _weighting(config: CompressionConfig) -> dict[str, Any]:
    """Give what decides how errors are weighted."""
    keys = ("cost", "token_weights", "damping", "groups", "include", "exclude")
    return {key: getattr(config, key) for key in keys}


def _correct(corrections: Corrections, trial: Trial, group: Group, profile: GroupProfile, objective: Objective) -> None:
    families, method = trial.families, trial.method
    # Other learners take minutes for what HTP does in a second, and end within a few per cent of it.
    quick = method if isinstance(method.solver, HTP) or not method.solver.sparse else replace(method, solver=HTP())
    for name, side in families.curves(profile.in_features, profile.out_features).items():
        points = profile.points[name]
        point = points[len(points) // 2] if side == SPARSE else _middle(points, families)
        exact = objective.loss_increase(_free(point, side, objective, group, quick).factorization.joined())
        if point.loss_increase > 0:
            corrections.solved[f"{profile.group_kind} {side}"] = exact / point.loss_increase
        # What rounding adds shows where the factors themselves lose least; elsewhere it drowns in their own error.
        finest = max(points, key=lambda p: (p.n_atoms, p.n_nonzero))
        found = _free(finest, side, objective, group, quick)
        exact = objective.loss_increase(found.factorization.joined())
        for value_dtype, learned_dtype in families.dtypes:
            dictionary_dtype = "none" if side == SPARSE else learned_dtype
            stored = replace(_choice(finest, side), value_dtype=value_dtype, dictionary_dtype=dictionary_dtype)
            packed = rounded(stored, found, objective).factorization
            spec, tensors = pack_group(packed, method.format, value_dtype, {}, group.shared_input, dictionary_dtype)
            added = objective.loss_increase(unpack_group(spec, tensors).joined()) - exact
            key = f"{profile.group_kind} {side} {value_dtype}"
            corrections.rounded[key] = max(added, 0.0) / profile.energy if profile.energy > 0 else 0.0
    for dtype in families.quantized:
        nearest = math.fsum(profile.quantized[dtype])
        if nearest > 0:
            _, weight = rounded_weight(objective, dtype)
            corrections.quantized[f"{profile.group_kind} {dtype}"] = objective.loss_increase(weight) / nearest


def _choice(point: Point, side: str) -> Factors:
    if side == SPARSE:
        return Factors(point.n_atoms, point.n_nonzero, dictionary_dtype="none")
    return Factors(point.n_atoms, point.n_nonzero, side)  # type: ignore[arg-type]


def _free(point: Point, side: str, objective: Objective, group: Group, method: Method) -> Approximation:
    return approximate(_choice(point, side), objective, group, method)


def _middle(points: Sequence[Point], families: Families) -> Point:
    """Give a point of medium size and medium rho."""
    rho = families.rhos[len(families.rhos) // 2] if families.sparse else 1.0
    largest = max(p.n_atoms for p in points)
    return min(points, key=lambda p: (abs(p.n_atoms / largest - 0.55), abs(p.n_atoms / p.n_nonzero - rho)))
