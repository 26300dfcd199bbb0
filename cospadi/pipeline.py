"""Compress a model: the stages joined.

map the model -> form groups -> allocate sizes -> for each block: collect Grams -> for each group: whiten, solve, pack,
record -> write the checkpoint folder.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.allocation.budget import Budget, GroupShape, Size
from cospadi.allocation.uniform import Uniform
from cospadi.calibration.collectors import GramCollector
from cospadi.calibration.data import fingerprint, read_text, token_windows
from cospadi.calibration.lockstep import Lockstep, forward_call
from cospadi.calibration.statistics import Gram
from cospadi.config import CompressionConfig
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.events import BlockCalibrated, Event, GroupFinished, Listener, Planned, Written
from cospadi.experts import split_experts
from cospadi.export import write_checkpoint
from cospadi.factorize import Method, factorize_group
from cospadi.formats.base import FORMATS
from cospadi.groups import Group, form_groups
from cospadi.layers import Layer, ModelMap, map_model, weight_matrix
from cospadi.models import OpenModel, open_model
from cospadi.report import Report, machine, totals, versions, write_report
from cospadi.solvers.auto import Auto
from cospadi.solvers.base import SOLVERS
from cospadi.work import WorkFolder, check_output, write_durably


@dataclass(frozen=True)
class Plan:
    """What is to be done with each group; the same for a run and its resumption."""

    config: CompressionConfig
    method: Method
    reason: str
    map: ModelMap
    groups: tuple[Group, ...]
    sizes: tuple[Size | None, ...]

    @property
    def work(self) -> list[tuple[int, Group, Size]]:
        """The groups that get a factorisation, with their index."""
        return [(i, g, s) for i, (g, s) in enumerate(zip(self.groups, self.sizes, strict=True)) if s is not None]


def compress(
    model: Any,
    out: str | Path,
    config: CompressionConfig | None = None,
    *,
    tokenizer: Any = None,
    windows: Tensor | None = None,
    grams: Mapping[str, Gram] | None = None,
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
    grams : mapping of str to Gram, optional
        What ``collect_grams`` gave for the same model and tokens; saves the calibration pass.
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
    plan = _plan(config, method, reason, mapped)

    folder = WorkFolder(out, _fingerprint(source, windows, config), resume)
    tell(Planned(len(plan.work), len(mapped.layers), len(mapped.blocks), method.solver_name, reason))
    seconds = _run(plan, source, windows, call, grams, folder, tell)
    records = [folder.load(index) for index, _, _ in plan.work]
    finished = [record for record in records if record is not None]
    if len(finished) < len(records):
        raise CheckpointError(f"a record has vanished from {folder.folder} or cannot be read back: run with --resume")
    report = _report(plan, source, windows, [record.row for record in finished])
    used = [name for name in experts if any(layer.name.startswith(f"{name}.") for layer in mapped.layers)]
    other_bytes = write_checkpoint(out, source, finished, used, config.backend)
    kept_bytes = sum(2 * layer["in_features"] * layer["out_features"] for layer in report["kept_dense"])
    report["totals"] = totals(report["groups"], other_bytes, kept_bytes)
    write_report(out, report)
    run = {
        "began": begin,
        "seconds": time.time() - begin,
        "machine": machine(),
        "versions": versions(),
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
    modules = dict(source.model.named_modules())
    layers = {layer.source: layer for layer in mapped.layers}
    watched = {name: modules[name] for name in layers}
    with (
        GramCollector(watched, {name: la.in_features for name, la in layers.items()}) as collector,
        Lockstep([modules[name] for name in mapped.blocks], call, windows.split(batch_size)) as walk,
    ):
        for _ in mapped.blocks:
            walk.advance()
    return collector.statistics


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
    return Method(name, solver, format_name, config.value_dtype, config.damping, config.seed), reason


def _plan(config: CompressionConfig, method: Method, reason: str, mapped: ModelMap) -> Plan:
    groups = form_groups(mapped.layers, config.groups)
    codec = FORMATS.create(method.format)
    budget = Budget(config.ratio, config.rho, codec, config.value_dtype, config.convention, method.solver.sparse)
    sizes = Uniform(budget).allocate([GroupShape(g.in_features, g.out_features) for g in groups])
    plan = Plan(config, method, reason, mapped, tuple(groups), tuple(sizes))
    if not plan.work:
        raise UsageError(f"at ratio {config.ratio} no layer is large enough to save anything: choose another ratio")
    return plan


def _run(
    plan: Plan,
    source: OpenModel,
    windows: Tensor,
    call: Callable[[Any], Any],
    grams: Mapping[str, Gram] | None,
    folder: WorkFolder,
    tell: Listener,
) -> dict[str, float]:
    """Calibrate and solve block by block whatever has no record yet; give the seconds that each group took."""
    total, done = len(plan.work), 0
    seconds: dict[str, float] = {}
    pending = []
    for index, group, size in plan.work:
        record = folder.load(index)
        if record is None:
            pending.append((index, group, size))
        else:
            done += 1
            tell(GroupFinished(record.row, done, total, 0.0, resumed=True))
    if not pending:
        return seconds
    modules = dict(source.model.named_modules())
    held: dict[str, Gram] = {}
    for block, fresh in _blocks(plan, pending, modules, windows, call, grams):
        held.update(fresh)
        tell(BlockCalibrated(block, len(plan.map.blocks)))
        for index, group, size in [p for p in pending if p[1].last_block == block]:
            start = time.perf_counter()
            weights = [weight_matrix(modules[la.name]) for la in group.layers]
            biases = {la.name: modules[la.name].get_parameter("bias") for la in group.layers if la.bias}
            record = factorize_group(group, size, weights, biases, held, plan.method)
            folder.store(index, record)
            done += 1
            seconds[group.name] = time.perf_counter() - start
            tell(GroupFinished(record.row, done, total, seconds[group.name], resumed=False))
        later = {la.source for _, g, _ in pending if g.last_block > block for la in g.layers}
        held = {name: gram for name, gram in held.items() if name in later}
    return seconds


def _blocks(
    plan: Plan,
    pending: Sequence[tuple[int, Group, Size]],
    modules: Mapping[str, nn.Module],
    windows: Tensor,
    call: Callable[[Any], Any],
    grams: Mapping[str, Gram] | None,
) -> Iterator[tuple[int, dict[str, Gram]]]:
    """Give each block's index and the Grams of its inputs that pending groups want, up to the last such block."""
    n_blocks = 1 + max(group.last_block for _, group, _ in pending)
    wanted: list[dict[str, Layer]] = [{} for _ in range(n_blocks)]
    for layer in [la for _, group, _ in pending for la in group.layers]:
        wanted[layer.block][layer.source] = layer
    if grams is not None:
        missing = [name for layers in wanted for name in layers if name not in grams]
        if missing:
            raise UsageError(f"the Grams given lack {missing[0]} and {len(missing) - 1} more: collect them again")
        for block, layers in enumerate(wanted):
            yield block, {name: grams[name] for name in layers}
        return
    batches = windows.split(plan.config.calibration.batch_size)
    with Lockstep([modules[name] for name in plan.map.blocks], call, batches) as walk:
        for block, layers in enumerate(wanted):
            watched = {name: modules[name] for name in layers}
            with GramCollector(watched, {name: la.in_features for name, la in layers.items()}) as collector:
                walk.advance()
            yield block, collector.statistics


def _report(plan: Plan, source: OpenModel, windows: Tensor, rows: list[dict[str, Any]]) -> Report:
    kept = [
        {
            "name": layer.name,
            "reason": "a factorisation would save nothing at this ratio",
            "in_features": layer.in_features,
            "out_features": layer.out_features,
        }
        for group, size in zip(plan.groups, plan.sizes, strict=True)
        if size is None
        for layer in group.layers
    ]
    return {
        "cospadi": versions()["cospadi"],
        "model": source.name,
        "causal": source.model.can_generate(),
        "config": plan.config.to_dict(),
        "calibration": {
            "source": plan.config.calibration.text or "the public-domain text of the package",
            "fingerprint": fingerprint(windows),
            "windows": windows.shape[0],
            "seq_len": windows.shape[1],
        },
        "solver": {"name": plan.method.solver_name, "reason": plan.reason},
        "format": plan.method.format,
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
    "BlockCalibrated",
    "Event",
    "GroupFinished",
    "Listener",
    "Planned",
    "Written",
    "choose_method",
    "collect_grams",
    "compress",
    "write_report",
]
