"""Compress a model: the stages joined.

map the model -> form groups -> collect statistics -> profile and allocate -> for each group: whiten, solve, pack,
record -> write the checkpoint folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.collectors import GramCollector
from cospadi.calibration.data import fingerprint, read_text, token_windows
from cospadi.calibration.gradients import SourceStatistics
from cospadi.calibration.lockstep import Lockstep, forward_call
from cospadi.calibration.sensitivity import collect_statistics
from cospadi.calibration.statistics import Gram
from cospadi.config import CompressionConfig
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.events import Calibrated, Listener, Planned, Profiled, Written
from cospadi.experts import fuse_experts, split_experts
from cospadi.export import write_checkpoint
from cospadi.factorize import Method
from cospadi.formats.base import FORMATS
from cospadi.grouping import match_groups, pair_distances
from cospadi.groups import Group, form_groups
from cospadi.layers import ModelMap, map_model, weight_matrix
from cospadi.measurements import Measurements
from cospadi.models import OpenModel, open_model
from cospadi.objective import Objective
from cospadi.planning import (
    Assignment,
    allocate,
    check_plan,
    families_of,
    measure_corrections,
    profile_groups,
    uniform_assignment,
)
from cospadi.report import Report, machine, totals, versions, write_report
from cospadi.solvers.auto import Auto
from cospadi.solvers.base import SOLVERS
from cospadi.solving import Job, check_order, solve
from cospadi.work import WorkFolder, check_output, write_durably


def compress(
    model: Any,
    out: str | Path,
    config: CompressionConfig | None = None,
    *,
    tokenizer: Any = None,
    windows: Tensor | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
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
        Continue what an interrupted run left in ``out``; starts afresh where there is nothing.
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
    config = config or CompressionConfig()
    out, begin, tell = Path(out), time.time(), on_event or (lambda event: None)
    check_output(out, resume)
    method, reason = choose_method(config)
    device = _device(config.device)
    source = open_model(model, device, tokenizer)
    if windows is None:
        windows = _windows(source, config)
    _check_windows(source, windows)
    experts = split_experts(source.model)
    call = forward_call(source.model, device)
    example = windows[:1, : min(8, windows.shape[1])]
    mapped = map_model(source.model, lambda: call(example), config.include, config.exclude)
    matching = config.groups == "matching"
    groups = tuple(form_groups(mapped.layers, "natural" if matching else config.groups))
    check_order(config, groups)
    check_plan(config, method, groups)

    fingerprints = _fingerprint(source, windows, config)
    folder = WorkFolder(out, fingerprints, resume)
    facts = {key: fingerprints[key] for key in ("model", "calibration", "versions")} | _statistics(config)
    measurements = Measurements(Path(cache) if cache else folder.folder / "measurements", facts)
    job = Job(config, method, reason, source, mapped, groups, windows, call, measurements)
    times: dict[str, float] = {}
    with _timed(times, "calibration"):
        _calibrate(job, tell)
        if matching:
            job = replace(job, groups=_matched(job))
            check_order(config, job.groups)
    with _timed(times, "planning"):
        plan = _assign(job, tell)
    factors = sum(unit.choice.kind == "factors" for unit in plan.units)
    tell(Planned(len(mapped.layers), len(plan.units), factors, len(plan.dense), method.solver_name, reason))
    with _timed(times, "solving"):
        seconds = solve(job, plan.units, folder, tell)
    records = [folder.load(index) for index in range(len(plan.units))]
    finished = [record for record in records if record is not None]
    if len(finished) < len(records):
        raise CheckpointError(f"a record has vanished from {folder.folder} or cannot be read back: run with --resume")
    report = _report(job, plan, [record.row for record in finished])
    used = [name for name in experts if any(layer.name.startswith(f"{name}.") for layer in mapped.layers)]
    fuse_experts(source.model, set(experts) - set(used))  # loading splits the others only
    other_bytes = write_checkpoint(out, source, finished, used, config.backend)
    kept_bytes = sum(2 * layer["in_features"] * layer["out_features"] for layer in report["kept_dense"])
    report["totals"] = totals(report["groups"], other_bytes, kept_bytes)
    write_report(out, report)
    run = {
        "began": begin,
        "seconds": time.time() - begin,
        "machine": machine(),
        "versions": versions(),
        "stages": times,
        "groups": seconds,
    }
    write_durably(out / "run.json", json.dumps(run, indent=1).encode())
    folder.remove()
    tell(Written(str(out)))
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
    place = _device(device)
    source = open_model(model, place)
    _check_windows(source, windows)
    split_experts(source.model)
    call = forward_call(source.model, place)
    mapped = map_model(source.model, lambda: call(windows[:1, : min(8, windows.shape[1])]))
    found: dict[str, Gram] = {}
    for grams in _grams(source.model, mapped, windows, call, batch_size):
        found.update(grams)
    return found


def choose_method(config: CompressionConfig) -> tuple[Method, str]:
    """Resolve the recipe's solver and format, and say why this solver.

    Raises
    ------
    UsageError
        A name or option is unknown, the solver cannot run here, or the format does not fit the solver.
    """
    name, reason = config.solver, "named in the recipe"
    if name == "auto":
        name, reason = Auto.choose(_device(config.device).type)
    state = SOLVERS.availability(name)
    if not state:
        raise UnavailableError(f"solver {name!r} cannot run here: {state.reason}")
    solver = SOLVERS.create(name, config.solver_options)
    format_name = config.format or ("bitmask" if solver.sparse else "dense")
    if not solver.sparse and format_name != "dense":
        raise UsageError(f"solver {name!r} has dense coefficients: format {format_name!r} does not fit, use dense")
    FORMATS.get(format_name)
    return Method(name, solver, format_name, config.seed), reason


def _statistics(config: CompressionConfig) -> dict[str, Any]:
    """Give what is to be collected, as facts that name a cache."""
    sensitive = config.column_weights or config.token_weights or _cost_is_sensitivity(config)
    return {
        "sensitivities": sensitive,
        "token_weights": config.token_weights,
        "labels": config.calibration.labels if sensitive else None,
        "seed": config.seed if sensitive else None,
        # Sums round differently in another order.
        "batch_size": config.calibration.batch_size,
        "device": _device(config.device).type,
    }


def _cost_is_sensitivity(config: CompressionConfig) -> bool:
    return config.allocation != "uniform" and config.cost == "sensitivity"


def _calibrate(job: Job, tell: Listener) -> None:
    """Collect the statistics of every input that is not measured yet."""
    sources = {layer.source for layer in job.map.layers}
    if all(source in job.measurements for source in sources):
        return
    wanted, batch = _statistics(job.config), job.config.calibration.batch_size
    if wanted["sensitivities"]:
        found = collect_statistics(
            job.source.model,
            job.map,
            job.call,
            job.windows,
            batch_size=batch,
            labels=wanted["labels"],
            seed=job.config.seed,
            weighted=wanted["token_weights"],
            progress=lambda done, total: tell(Calibrated(done, total, "windows")),
        )
        for statistics in found.values():
            job.measurements.store(statistics)
        return
    for block, grams in enumerate(_grams(job.source.model, job.map, job.windows, job.call, batch)):
        for source, gram in grams.items():
            widths = {layer.name: layer.out_features for layer in job.map.layers if layer.source == source}
            statistics = SourceStatistics(source, gram.matrix.shape[0], widths)
            statistics.gram, statistics.n_tokens = gram, job.windows.numel()
            job.measurements.store(statistics)
        tell(Calibrated(block + 1, len(job.map.blocks), "blocks"))


def _matched(job: Job) -> tuple[Group, ...]:
    """Join the groups to pairs that lose least by sharing a dictionary."""
    modules = dict(job.source.model.named_modules())
    weights = {layer.name: weight_matrix(modules[layer.name]) for layer in job.map.layers}
    grams, sensitivities = {}, {}
    for layer in job.map.layers:
        statistics = job.measurements[layer.source]
        assert statistics.gram is not None
        grams[layer.source] = statistics.gram
        sensitivities[layer.name] = statistics.squares(layer.name)
    weighted = _statistics(job.config)["sensitivities"]
    distances = pair_distances(
        job.groups, weights, grams, sensitivities if weighted else None, damping=job.config.damping
    )
    return tuple(match_groups(job.groups, distances))


def _grams(
    model: nn.Module, mapped: ModelMap, windows: Tensor, call: Callable[[Any], Any], batch_size: int
) -> Iterator[dict[str, Gram]]:
    """Give the Grams of each block's inputs, block by block."""
    modules = dict(model.named_modules())
    with Lockstep([modules[name] for name in mapped.blocks], call, windows.split(batch_size)) as walk:
        for block in range(len(mapped.blocks)):
            layers = {layer.source: layer for layer in mapped.layers if layer.block == block}
            watched = {name: modules[name] for name in layers}
            with GramCollector(watched, {name: la.in_features for name, la in layers.items()}) as collector:
                walk.advance()
            yield collector.statistics


def _assign(job: Job, tell: Listener) -> Assignment:
    """Decide how each group is stored."""
    config, method = job.config, job.method
    if config.allocation == "uniform":
        return uniform_assignment(config, method, job.groups)
    families = families_of(config, method)

    def make(group: Group) -> Objective:
        return job.objective(group, _cost_is_sensitivity(config))

    def progress(done: int, total: int) -> None:
        tell(Profiled(done, total))

    profiles = profile_groups(config, families, job.groups, make, job.measurements, progress)
    corrections = measure_corrections(config, method, families, job.groups, profiles, make, job.measurements)
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: expected auto, cpu or cuda[:index]") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {name!r} cannot be used: torch finds no CUDA GPU on this machine")
    return device


def _windows(source: OpenModel, config: CompressionConfig) -> Tensor:
    if source.tokenizer is None:
        raise UsageError("a model object needs a tokenizer or calibration windows beside it")
    text = read_text(config.calibration.text)
    return token_windows(source.tokenizer, text, config.calibration.seq_len, config.calibration.samples)


def _check_windows(source: OpenModel, windows: Tensor) -> None:
    vocabulary = source.model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= vocabulary:
        raise UsageError(
            f"token {int(windows.max())} is outside the model's vocabulary of {vocabulary}: wrong tokenizer?"
        )
    longest = getattr(source.model.config, "max_position_embeddings", None)
    if longest and windows.shape[1] > longest:
        raise UsageError(f"seq_len {windows.shape[1]} exceeds the model's {longest} positions: choose a smaller one")


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    times[stage] = time.perf_counter() - begin


def _fingerprint(source: OpenModel, windows: Tensor, config: CompressionConfig) -> dict[str, str]:
    """Name everything that the result depends on."""
    digest = hashlib.sha256()
    for name, tensor in (*source.model.named_parameters(), *source.model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy())
    return {
        "model": digest.hexdigest(),
        "calibration": fingerprint(windows),
        # The backend only runs the result; it may change between a run and its resumption.
        "recipe": json.dumps(config.model_copy(update={"backend": "auto"}).to_dict(), sort_keys=True),
        "versions": json.dumps(versions(), sort_keys=True),
    }


__all__ = [
    "choose_method",
    "collect_grams",
    "compress",
    "write_report",
]
