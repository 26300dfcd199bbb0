"""What a run begins with: the model and its groups, the solver, every check, and what the result depends on."""

import importlib.util
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.allocation import Method
from cospadi.arrays import torch_device
from cospadi.calibration import fingerprint, largest_batch, open_text, token_windows
from cospadi.errors import UnavailableError, UsageError
from cospadi.events import Listener, Retried
from cospadi.executors import Executor, available_threads, devices_of_workers, make_executor
from cospadi.formats import FORMATS
from cospadi.models import Group, OpenModel, form_groups, open_model
from cospadi.pipeline.group_inputs import reader_of
from cospadi.pipeline.job import Workplace
from cospadi.pipeline.mapped_model import MappedModel, find_layers
from cospadi.pipeline.memory_plan import Budget
from cospadi.pipeline.statistics_store import Measurements
from cospadi.pipeline.work_folder import WORK, read_fingerprint
from cospadi.recipe import CompressionConfig, Execution
from cospadi.reporting import versions
from cospadi.solvers import SOLVERS, Auto

logger = logging.getLogger(__name__)


def choose_method(config: CompressionConfig) -> tuple[Method, str]:
    """Resolve the recipe's solver and format, and say why this solver.

    Raises
    ------
    UsageError
        A name or option is unknown, the solver cannot run here, or the format does not fit the solver.
    """
    name, reason = config.solver, "named in the recipe"
    if name == "auto":
        name, reason = Auto.choose(torch_device(config.device).type)
    state = SOLVERS.availability(name)
    if not state:
        raise UnavailableError(f"solver {name!r} cannot run here: {state.reason}")
    solver = SOLVERS.create(name, config.solver_options)
    format_name = config.format or ("bitmask" if solver.sparse else "dense")
    if not solver.sparse and format_name != "dense":
        raise UsageError(f"solver {name!r} has dense coefficients: format {format_name!r} does not fit, use dense")
    FORMATS.get(format_name)
    return Method(name, solver, format_name, config.seed), reason


def open_mapped_model(
    model: Any,
    config: CompressionConfig,
    *,
    tokenizer: Any,
    windows: Tensor | None,
    streamed: bool,
) -> MappedModel:
    """Open a dense model, take its calibration windows, find its linear layers and form their groups.

    Parameters
    ----------
    model, tokenizer, windows
        See ``compress``.
    config : CompressionConfig
        The recipe.
    streamed : bool
        Read the weights block by block instead of holding all of them in memory.

    Raises
    ------
    UsageError
        The model cannot be opened, the windows do not fit it, or the recipe names layers that it has not.
    """
    source = open_model(model, torch_device(config.device), tokenizer, streamed=streamed, split=True)
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
    mapped = find_layers(source, windows, config.include, config.exclude)
    matching = config.groups == "matching"
    groups = form_groups(mapped.layers, "natural" if matching else config.groups)
    return MappedModel(source, mapped, tuple(groups), windows)


def calibration_windows(source: OpenModel, config: CompressionConfig) -> Tensor:
    """Give the calibration tokens of a recipe, shape (n_windows, seq_len), int64.

    Raises
    ------
    UsageError
        The model has no tokenizer, or the text cannot be read or is too short.
    """
    if source.tokenizer is None:
        raise UsageError("a model object needs a tokenizer or calibration windows beside it")
    text = open_text(config.calibration.text)
    return token_windows(source.tokenizer, text, config.calibration.seq_len, config.calibration.samples)


def check_windows(source: OpenModel, windows: Tensor) -> None:
    """Refuse tokens that a model cannot take.

    Raises
    ------
    UsageError
        They are no whole numbers in windows, outside the vocabulary, or more in a window than there are positions.
    """
    if windows.ndim != 2 or windows.numel() == 0 or windows.dtype not in (torch.int64, torch.int32):
        raise UsageError(
            f"windows need whole numbers in a shape (n_windows, seq_len), got {windows.dtype} {tuple(windows.shape)}"
        )
    if int(windows.min()) < 0:
        raise UsageError(f"token {int(windows.min())} is negative: wrong tokenizer?")
    vocabulary = source.model.get_input_embeddings().weight.shape[0]
    if int(windows.max()) >= vocabulary:
        raise UsageError(
            f"token {int(windows.max())} is outside the model's vocabulary of {vocabulary}: wrong tokenizer?"
        )
    longest = getattr(source.model.config, "max_position_embeddings", None)
    if longest and windows.shape[1] > longest:
        raise UsageError(f"seq_len {windows.shape[1]} exceeds the model's {longest} positions: choose a smaller one")


def check_order(config: CompressionConfig, groups: Sequence[Group]) -> None:
    """Refuse groups that sequential calibration cannot take in turn.

    Raises
    ------
    UsageError
        A group spans several blocks, or tokens are weighted.
    """
    if config.calibration.order != "sequential":
        return
    for group in groups:
        if not group.shared_input:
            raise UsageError(
                f"sequential calibration takes one input after the other: {group.name} shares a dictionary with layers "
                "of other inputs; choose groups none or natural"
            )
    if config.token_weights:
        raise UsageError("sequential calibration knows no token weights: switch off one of the two")


def check_execution(model: MappedModel, config: CompressionConfig, execution: Execution) -> None:
    """Refuse parts, groups or workers that the model and the windows do not allow.

    Raises
    ------
    UsageError
        There are fewer windows than parts, the groups need all weights, or the model is an object of this process.
    UnavailableError
        Ray is not installed.
    """
    if config.calibration.parts > len(model.windows):
        raise UsageError(
            f"{len(model.windows)} calibration windows cannot be divided into parts={config.calibration.parts}"
        )
    if execution.max_memory is not None and config.groups == "matching":
        raise UsageError("groups 'matching' need all weights at once: leave out max_memory, or choose other groups")
    several = execution.executor == "ray" or (execution.workers or 1) > 1
    if several and model.source.folder is None:
        raise UsageError("several workers read the model themselves: save it, and give its folder instead of an object")
    if execution.executor == "ray" and importlib.util.find_spec("ray") is None:
        raise UnavailableError("executor ray needs pip install 'cospadi[ray]'")


def fingerprints_of(model: MappedModel, config: CompressionConfig) -> dict[str, str]:
    """Name everything that the result depends on."""
    return {
        "model": model.source.digest(),
        "calibration": fingerprint(model.windows),
        # The backend only runs the result; it may change between a run and its resumption.
        "recipe": json.dumps(config.model_copy(update={"backend": "auto"}).to_dict(), sort_keys=True),
        "versions": json.dumps(versions(), sort_keys=True),
    }


def measurement_facts(
    fingerprints: dict[str, str], config: CompressionConfig, device: torch.device, threads: int
) -> dict[str, Any]:
    """Give what is collected and what its last bits depend on, as facts that name a cache."""
    sensitive = config.needs_sensitivities
    facts: dict[str, Any] = {key: fingerprints[key] for key in ("model", "calibration", "versions")}
    facts |= {
        "sensitivities": sensitive,
        "token_weights": config.token_weights,
        "labels": config.calibration.labels if sensitive else None,
        "seed": config.seed if sensitive else None,
        "batch_size": config.calibration.batch_size,
        "device": device.type,
        "threads": threads,
    }
    return facts | ({"parts": config.calibration.parts} if config.calibration.parts > 1 else {})


def batch_size_of(model: MappedModel, config: CompressionConfig) -> int:
    """Give the calibration windows that run at a time: as asked, as many as there are, as the logits allow."""
    n_windows, seq_len = model.windows.shape
    most = largest_batch(model.source.model, seq_len) if config.needs_sensitivities else n_windows
    return min(most, config.calibration.batch_size, n_windows)


def threads_of(out: Path, device: torch.device, execution: Execution) -> int | None:
    """Give the threads of a task as asked or, for a new run, as the executor would choose them."""
    if execution.threads is not None or read_fingerprint(out / WORK) is not None:
        return execution.threads
    if execution.executor == "ray":
        return 1
    workers = len(devices_of_workers(str(device), torch.cuda.device_count(), execution.workers))
    return max(1, available_threads() // workers)


def open_executor(execution: Execution, device: torch.device, threads: int, tell: Listener) -> Executor:
    """Give the executor that was asked for; it tells of tasks that run again."""
    executor = make_executor(
        execution.executor,
        device=device,
        workers=execution.workers,
        threads=threads,
        ray_address=execution.ray_address,
        ray_inputs=execution.ray_inputs,
    )
    executor.retried = lambda task, why: tell(Retried(task, why))
    return executor


def workplace(
    model: MappedModel,
    measurements: Measurements,
    executor: Executor,
    execution: Execution,
    budget: Budget,
    scratch: Path,
) -> Workplace:
    """Give where a run works; several workers read the inputs of groups from folders."""
    several = executor.n_workers > 1 or execution.executor == "ray"
    reader = reader_of(model.source, measurements, shared=several)
    return Workplace(executor, reader, budget, scratch.absolute(), shared_storage=execution.ray_inputs == "shared")
