"""Whole models: prefill and decode of the compressed and the dense model by the same loop, and their peak memory."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.arrays import dtype_name
from cospadi.backends import BACKENDS, explain, sparse_modules
from cospadi.errors import NumericalError, UnavailableError
from cospadi.evaluation.speed.greedy_decoding import Run, random_prompt
from cospadi.evaluation.speed.model_figures import ModelFigures, ModelRow, ModelSettings
from cospadi.evaluation.speed.model_variants import load_variant
from cospadi.evaluation.speed.peak_memory import PeakMemory, peak_in_a_process
from cospadi.evaluation.speed.timing import Clock, clock_of, median_ratio, spread
from cospadi.integrations import require_checkpoint


def measure_model(
    settings: ModelSettings, tell: Callable[[str], None] = lambda text: None, clock: Clock | None = None
) -> ModelFigures:
    """Measure a compressed model beside the dense one.

    Parameters
    ----------
    settings : ModelSettings
    tell : callable
        Receives a line per step.
    clock : Clock, optional
        By default that of the device.

    Raises
    ------
    UsageError
        A model cannot be loaded or does not generate, or the tokens are more than its context.
    NumericalError
        Logits are not finite.
    """
    require_checkpoint(Path(settings.model))
    for name in settings.backends:
        state = BACKENDS.availability(name)
        if not state:
            raise UnavailableError(f"backend {name!r} cannot run here: {state.reason}")
    rows: list[ModelRow] = []
    chosen: dict[str, str] = {}
    attention = ""
    for dtype in settings.dtypes:
        contenders = settings.contenders(dtype)
        models = {}
        for one in contenders:
            tell(f"loading {one.label}, {dtype_name(dtype)}")
            models[one.label] = load_variant(one)
        attention = _same_attention(models)
        for one in (one for one in contenders if one.backend == "auto"):
            chosen[f"{one.label}, {dtype_name(dtype)}"] = "; ".join(describe(models[one.label]))
        memory: dict[str, PeakMemory] = {}
        for one in contenders if settings.memory else ():
            tell(f"memory of {one.label}, {dtype_name(dtype)}")
            memory[one.label] = peak_in_a_process(one, settings.prompt_tokens, min(settings.new_tokens, 8))
        tell(f"prefill and decode, {dtype_name(dtype)}")
        rows += _rows(models, memory, settings, dtype, clock or clock_of(settings.device))
        del models
    baseline = settings.baseline or "the same checkpoint, multiplied out to dense layers"
    return ModelFigures(settings, baseline, attention, chosen, rows)


def describe(model: torch.nn.Module) -> list[str]:
    """Give one line for each backend that runs compressed layers of a model, with the reason if ``auto`` chose it."""
    dtype = getattr(model, "dtype", torch.get_default_dtype())
    layers = sparse_modules(model).values()
    found = dict.fromkeys(explain(layer.backend, layer.device, dtype) for layer in layers)
    return list(found)


def _rows(
    models: dict[str, Any],
    memory: dict[str, PeakMemory],
    settings: ModelSettings,
    dtype: torch.dtype,
    clock: Clock,
) -> list[ModelRow]:
    """Time the models in turns."""
    ids = random_prompt(list(models.values()), settings.prompt_tokens, settings.new_tokens, settings.seed)
    times: dict[str, dict[str, list[float]]] = {label: {"prefill": [], "decode": []} for label in models}
    logits: dict[str, Tensor] = {}
    labels = list(models)
    for repeat in range(-1, settings.repeats):  # the first round warms up
        first = max(repeat, 0) % len(labels)
        for label in labels[first:] + labels[:first]:
            run = Run(models[label], ids)
            prefill, decode = clock(run.prefill), clock(partial(run.decode, settings.new_tokens))
            if repeat < 0:
                logits[label] = run.first_logits.double()
            else:
                times[label]["prefill"].append(prefill)
                times[label]["decode"].append(decode)
    dense, rows = labels[0], []
    for label in labels:
        if not bool(torch.isfinite(logits[label]).all()):
            raise NumericalError(f"{label}, {dtype_name(dtype)}: the model's logits are NaN or infinite")
        difference = None
        if settings.baseline is None:
            difference = float((logits[label] - logits[dense]).norm() / logits[dense].norm())
        prefill_rate = spread([settings.prompt_tokens / seconds for seconds in times[label]["prefill"]])
        decode_rate = spread([settings.new_tokens / seconds for seconds in times[label]["decode"]])
        faster = {part: median_ratio(times[dense][part], times[label][part]) for part in ("prefill", "decode")}
        measured = memory.get(label)
        rows.append(
            ModelRow(
                contender=label,
                dtype=dtype_name(dtype),
                prefill_tokens_per_second=prefill_rate.median,
                prefill_low=prefill_rate.low,
                prefill_high=prefill_rate.high,
                decode_tokens_per_second=decode_rate.median,
                decode_low=decode_rate.low,
                decode_high=decode_rate.high,
                times_prefill=faster["prefill"],
                times_decode=faster["decode"],
                weight_bytes=weight_bytes(models[label]),
                before_bytes=None if measured is None else measured.before_bytes,
                peak_bytes=None if measured is None else measured.peak_bytes,
                logits_difference=difference,
                verdict="" if label == dense else verdict(faster),
            )
        )
    return rows


def verdict(faster: dict[str, float]) -> str:
    """Say where a model is slower than the dense one."""
    slower = [part for part, factor in faster.items() if factor < 1]
    return f"slower than dense ({' and '.join(slower)})" if slower else ""


def weight_bytes(model: torch.nn.Module) -> int:
    """Count the bytes of a model's parameters and buffers, shared ones once."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def _same_attention(models: dict[str, Any]) -> str:
    """Give every model the attention of the first one, so that only the linear layers differ."""
    wanted = next(iter(models.values())).config._attn_implementation
    for model in models.values():
        if model.config._attn_implementation != wanted:
            model.set_attn_implementation(wanted)
    return str(wanted)
