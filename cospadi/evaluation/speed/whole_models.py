"""Whole models: prefill and decode of the compressed and the dense model by the same loop, and their peak memory."""

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.arrays import dtype_name
from cospadi.backends import BACKENDS, explain, sparse_modules
from cospadi.errors import NumericalError, UnavailableError
from cospadi.evaluation.speed.greedy_decoding import Run, random_prompt
from cospadi.evaluation.speed.model_variants import ModelVariant, load_variant
from cospadi.evaluation.speed.peak_memory import PeakMemory, peak_in_a_process
from cospadi.evaluation.speed.timing import Clock, clock_of, median_ratio, spread
from cospadi.integrations import require_checkpoint

METHOD = (
    "greedy, one sequence, random prompt; a plain loop over model(input_ids, past_key_values) for all models alike, "
    "since generate() adds the same time to each; decode follows the prefill of the same prompt; every model has a "
    "turn in every repeat; peak is the resident memory, libraries included, of a fresh process per model that loads it "
    "and runs once; a model that was multiplied out has a little more there than one loaded from a file (--baseline)"
)


@dataclass(frozen=True)
class ModelSettings:
    """What to measure.

    Attributes
    ----------
    model : str
        Folder of a compressed checkpoint.
    baseline : str or None
        Folder or hub id of the dense model; None multiplies the compressed one out.
    backends : tuple of str
        Registry names.
    dtypes : tuple of torch.dtype
        The models run in each of them.
    prompt_tokens, new_tokens : int
        Tokens of prefill and decode.
    device : torch.device
    repeats : int
    seed : int
        Of the prompt.
    memory : bool
        Whether to measure the memory, which loads every model once more.
    """

    model: str
    baseline: str | None = None
    backends: tuple[str, ...] = ("auto",)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    prompt_tokens: int = 512
    new_tokens: int = 64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 5
    seed: int = 0
    memory: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self) | {"dtypes": list(map(dtype_name, self.dtypes)), "device": str(self.device)}

    def contenders(self, dtype: torch.dtype) -> list[ModelVariant]:
        """Name the models that run side by side: the dense one first."""
        place = (str(self.device), dtype_name(dtype))
        dense = ModelVariant(self.baseline or self.model, None, *place)
        return [dense, *(ModelVariant(self.model, backend, *place) for backend in self.backends)]


@dataclass(frozen=True)
class ModelRow:
    """One model in one dtype.

    Attributes
    ----------
    contender : str
        ``dense``, or the backend of the compressed model.
    dtype : str
    prefill_tokens_per_second, decode_tokens_per_second : float
        Medians over the repeats.
    prefill_low, prefill_high, decode_low, decode_high : float
        Quartiles of the same.
    times_prefill, times_decode : float
        How many times faster than the dense model: medians of the ratios within a repeat.
    weight_bytes : int
        Of all parameters and buffers.
    before_bytes, peak_bytes : int or None
        Memory of the process before the model is loaded and at the worst moment of a run; on a GPU that of torch there.
    logits_difference : float or None
        Relative difference of the prompt's last logits from the dense model's; None beside another model.
    verdict : str
        ``slower than dense`` where prefill or decode is.
    """

    contender: str
    dtype: str
    prefill_tokens_per_second: float
    prefill_low: float
    prefill_high: float
    decode_tokens_per_second: float
    decode_low: float
    decode_high: float
    times_prefill: float
    times_decode: float
    weight_bytes: int
    before_bytes: int | None
    peak_bytes: int | None
    logits_difference: float | None
    verdict: str


@dataclass(frozen=True)
class ModelFigures:
    """The result of ``measure_model``.

    Attributes
    ----------
    settings : ModelSettings
    baseline : str
        What the dense model is.
    attention : str
        The implementation that all models share.
    chosen : dict of str to str
        What ``auto`` chose, by contender and dtype.
    rows : list of ModelRow
    method : str
        What the figures are, in words.
    """

    settings: ModelSettings
    baseline: str
    attention: str
    chosen: dict[str, str]
    rows: list[ModelRow]
    method: str = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self) | {"settings": self.settings.to_dict()}


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
