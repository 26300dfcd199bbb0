"""Compress a model: the stages joined.

map the model -> form groups -> collect statistics -> profile and allocate -> for each group: whiten, solve, pack,
record -> write the checkpoint folder.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cospadi.allocation import (
    Assignment,
    allocate,
    check_plan,
    families_of,
    match_groups,
    pair_distances,
    uniform_assignment,
)
from cospadi.arrays import torch_device
from cospadi.calibration import Gram, fingerprint, largest_batch
from cospadi.errors import CheckpointError, UsageError
from cospadi.events import Listener, Planned, PlannedUnit, Retried, Written
from cospadi.executors import make_executor
from cospadi.files import read_json, write_durably
from cospadi.models import Group, OpenModel, form_groups, fuse_experts, keep_small_heap, open_model, trim_heap
from cospadi.pipeline.group_inputs import Reader, SharedFolders, read_inputs
from cospadi.pipeline.job import Job, is_sensitive
from cospadi.pipeline.measure_costs import correction_paths, measure_corrections, profile_groups, profile_paths
from cospadi.pipeline.measure_inputs import calibrate
from cospadi.pipeline.measure_inputs import collect_grams as grams_by_block
from cospadi.pipeline.memory_plan import plan_memory
from cospadi.pipeline.setup import (
    calibration_windows,
    check_execution,
    check_windows,
    choose_method,
    fingerprints_of,
    map_source,
    measurement_facts,
    threads_of,
)
from cospadi.pipeline.solve_groups import check_order, cost_of, solve
from cospadi.pipeline.statistics_store import Measurements
from cospadi.pipeline.work_folder import WorkFolder, check_output, clear_finished, is_finished
from cospadi.pipeline.write_checkpoint import write_checkpoint
from cospadi.recipe import CompressionConfig, Execution
from cospadi.reporting import Report, machine, totals, versions, write_report

logger = logging.getLogger(__name__)


def compress(
    model: Any,
    out: str | Path,
    config: CompressionConfig | None = None,
    *,
    tokenizer: Any = None,
    windows: Tensor | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    execution: Execution | None = None,
    command: str | None = None,
    on_event: Listener | None = None,
) -> Report:
    """Compress a model into a checkpoint folder.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, a hub id, or a model (copied, left as it is).
    out : str or Path
        New or empty folder; while the run lasts it holds the finished groups.
    config : CompressionConfig, optional
        The recipe.
    tokenizer : tokenizer, optional
        Needed when a model object is given with no ``windows``; else taken from the folder.
    windows : Tensor, shape (n_windows, seq_len), int64, optional
        Calibration tokens in place of the recipe's text.
    cache : str or Path, optional
        Folder that keeps the statistics and the profile, so that another ratio of the same model costs only allocation
        and solving; several models and recipes may share one.  Without it they are deleted with the records.
    resume : bool
        Continue what an interrupted run left in ``out``; starts afresh where there is nothing, and gives the report of
        a run that has ended.
    execution : Execution, optional
        Where and within how much memory to work; by default in this process, with the whole model in memory.
    command : str, optional
        The command line, for ``cospadi-cli status``.
    on_event : callable, optional
        Told of each step.

    Returns
    -------
    dict
        The report, as written to OUT/report.json.

    Raises
    ------
    UsageError
        Something given is not allowed; nothing was written.
    NumericalError
        NaN or infinity in a layer, which the text names; what was finished stays for ``resume``.
    """
    config, execution = config or CompressionConfig(), execution or Execution()
    out, tell = Path(out), on_event or (lambda event: None)
    check_output(out, resume)
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise UsageError(f"cache {cache} is a file: choose a folder")
    if resume and is_finished(out):
        return _finished(out, config, tell)
    if execution.max_memory is not None:
        keep_small_heap()
    method, reason = choose_method(config)
    device = torch_device(config.device)
    threads = threads_of(out, device, execution)
    source = open_model(model, device, tokenizer, streamed=execution.max_memory is not None, split=True)
    if source.unused:
        logger.warning(
            "%s: %d stored tensors have no place in the model that its config describes and are left out, such as %s",
            source.name,
            len(source.unused),
            source.unused[0],
        )
    if windows is None:
        windows = calibration_windows(source, config)
    check_windows(source, windows)
    mapped = map_source(source, windows, config.include, config.exclude)
    matching = config.groups == "matching"
    groups = tuple(form_groups(mapped.layers, "natural" if matching else config.groups))
    check_order(config, groups)
    check_plan(config, method, groups)
    check_execution(source, windows, config, execution)

    sensitive = is_sensitive(config)
    size = largest_batch(source.model, windows.shape[1]) if sensitive else len(windows)
    size = min(size, config.calibration.batch_size, len(windows))
    budget = plan_memory(source, mapped, groups, windows, config, size, sensitive, execution.max_memory)

    fingerprints = fingerprints_of(source, windows, config)
    with (
        WorkFolder(out, fingerprints, resume, threads) as folder,
        make_executor(
            execution.executor,
            device=device,
            workers=execution.workers,
            threads=folder.threads,
            ray_address=execution.ray_address,
            ray_inputs=execution.ray_inputs,
        ) as executor,
    ):
        root = Path(cache) if cache else folder.folder / "measurements"
        facts = {key: fingerprints[key] for key in ("model", "calibration", "versions")}
        measurements = Measurements(root, facts | measurement_facts(config, device, folder.threads))
        shared = executor.n_workers > 1 or execution.executor == "ray"
        reader = SharedFolders.of(source, measurements).reader if shared else _reader(source, measurements)
        of_all = execution.ray_inputs == "shared"
        job = Job(
            config,
            method,
            reason,
            source,
            mapped,
            groups,
            windows,
            measurements,
            executor,
            reader,
            budget,
            folder.folder.absolute(),
            tell,
            of_all,
        )
        executor.retried = lambda task, why: tell(Retried(task, why))
        tell(budget.predicted)
        if command is not None:
            folder.note("command", command)
        return _run(job, out, folder)


def _finished(out: Path, config: CompressionConfig, tell: Listener) -> Report:
    """Give the report of a run that has ended, whose command is repeated.

    Raises
    ------
    UsageError
        The folder holds the result of another recipe.
    """
    report: Report = read_json(out, "report.json")
    if report.get("config") != json.loads(json.dumps(config.to_dict())):
        raise UsageError(f"output folder {out} holds a model made by another recipe: choose a new folder, or delete it")
    clear_finished(out)
    tell(Written(str(out)))
    return report


def _run(job: Job, out: Path, folder: WorkFolder) -> Report:
    """Go through the stages, as far as their records are not there."""
    config, began, times = job.config, time.time(), _Times(folder)
    folder.note("model", job.source.name)
    folder.note("measurements", str(job.measurements.folder.absolute()))
    folder.note("sources", sorted({layer.source for layer in job.map.layers}))
    with times.of("calibrating"):
        calibrate(job)
    if config.groups == "matching":
        job = replace(job, groups=_matched(job))
        check_order(config, job.groups)
    plan = _assign(job, folder, times)
    units = tuple(PlannedUnit(u.group.name, u.choice.kind, cost_of(job.method, u)) for u in plan.units)
    listed = [asdict(unit) for unit in units]
    if folder.noted("plan") not in (None, listed):
        raise CheckpointError(
            f"{folder.folder}: what was measured again gives another plan: delete it and start afresh"
        )
    folder.note("plan", listed)
    factors = sum(unit.choice.kind == "factors" for unit in plan.units)
    solver = job.method.solver_name
    job.tell(Planned(len(job.map.layers), len(plan.units), factors, len(plan.dense), solver, job.reason, units))
    with times.of("solving"):
        seconds = solve(job, plan.units, folder)
    with times.of("writing"):
        report = _report(job, plan, [_row(folder, index) for index in range(len(plan.units))])
        used = [n for n in job.source.experts if any(layer.name.startswith(f"{n}.") for layer in job.map.layers)]
        fuse_experts(job.source.model, set(job.source.experts) - set(used))  # loading splits the others only
        other_bytes = write_checkpoint(out, job.source, folder, len(plan.units), used, config.backend)
    kept_bytes = sum(2 * layer["in_features"] * layer["out_features"] for layer in report["kept_dense"])
    report["totals"] = totals(report["groups"], other_bytes, kept_bytes)
    write_report(out, report)
    run = {
        "began": began,
        "seconds": time.time() - began,
        "machine": machine(),
        "versions": versions(),
        "threads": job.executor.threads,
        "stages": times.seconds,
        "groups": seconds,
        "predicted_memory": asdict(job.budget.predicted),
    }
    write_durably(out / "run.json", json.dumps(run, indent=1).encode())
    folder.remove()
    job.tell(Written(str(out)))
    return report


def collect_grams(model: Any, windows: Tensor, batch_size: int = 8, device: str = "auto") -> dict[str, Gram]:
    """Collect the Gram of every distinct input of the model's linear layers.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        As for ``compress``.
    windows : Tensor, shape (n_windows, seq_len), int64
        Calibration tokens.
    batch_size : int
        Windows per forward pass.
    device : str
        As in the recipe.

    Returns
    -------
    dict of str to Gram
        By the name of the first layer that receives the input.  Grams of other tokens merge with them.
    """
    source = open_model(model, torch_device(device), split=True)
    check_windows(source, windows)
    found: dict[str, Gram] = {}
    for grams in grams_by_block(source, map_source(source, windows), windows, batch_size):
        found.update(grams)
    return found


def _reader(source: OpenModel, measurements: Measurements) -> Reader:
    return lambda group: partial(read_inputs, source, measurements, group)


def _row(folder: WorkFolder, index: int) -> dict[str, Any]:
    row = folder.row(index)
    if row is None:
        raise CheckpointError(f"a record has vanished from {folder.folder} or cannot be read back: run with --resume")
    return row


class _Times:
    """Seconds of each stage over all runs that worked on a folder."""

    def __init__(self, folder: WorkFolder) -> None:
        self._folder = folder
        noted = folder.noted("seconds")
        self.seconds: dict[str, float] = dict(noted) if isinstance(noted, dict) else {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        trim_heap()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
        self._folder.note("seconds", self.seconds)


def _matched(job: Job) -> tuple[Group, ...]:
    """Join the groups to pairs that lose least by sharing a dictionary."""
    weights = {layer.name: job.source.matrix(layer.name) for layer in job.map.layers}
    grams, sensitivities = {}, {}
    for layer in job.map.layers:
        statistics = job.measurements[layer.source]
        assert statistics.gram is not None
        grams[layer.source] = statistics.gram
        sensitivities[layer.name] = statistics.squares(layer.name)
    distances = pair_distances(
        job.groups, weights, grams, sensitivities if job.sensitive else None, damping=job.config.damping
    )
    return tuple(match_groups(job.groups, distances))


def _assign(job: Job, folder: WorkFolder, times: _Times) -> Assignment:
    """Decide how each group is stored."""
    config, method = job.config, job.method
    if config.allocation == "uniform":
        folder.note("profiles", [])
        folder.note("corrections", [])
        return uniform_assignment(config, method, job.groups)
    families = families_of(config, method)
    folder.note("profiles", profile_paths(job))
    with times.of("profiling"):
        profiles = profile_groups(job, families)
    folder.note("corrections", correction_paths(job, families, profiles))
    with times.of("correcting"):
        corrections = measure_corrections(job, families, profiles)
    return allocate(config, method, families, job.groups, profiles, corrections)


def _report(job: Job, plan: Assignment, rows: list[dict[str, Any]]) -> Report:
    config = job.config
    kept = [
        {
            "name": layer.name,
            "reason": "a factorisation would save nothing at this ratio"
            if config.allocation == "uniform"
            else "the bytes are spent better elsewhere",
            "in_features": layer.in_features,
            "out_features": layer.out_features,
        }
        for group in plan.dense
        for layer in group.layers
    ]
    return {
        "cospadi": versions()["cospadi"],
        "model": job.source.name,
        "left_out": list(job.source.unused),
        "causal": job.source.model.can_generate(),
        "config": config.to_dict(),
        "calibration": {
            "source": config.calibration.text or "the public-domain text of the package",
            "fingerprint": fingerprint(job.windows),
            "windows": job.windows.shape[0],
            "seq_len": job.windows.shape[1],
            "loss": next((job.measurements[layer.source].note for layer in job.map.layers), ""),
        },
        "solver": {"name": job.method.solver_name, "reason": job.reason},
        "format": job.method.format,
        "allocation": plan.account,
        "groups": rows,
        "kept_dense": kept,
        "totals": {},
        "evaluation": None,
    }


__all__ = ["collect_grams", "compress"]
