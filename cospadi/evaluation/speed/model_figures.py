"""The figures of whole models: what to measure, and what was found."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cospadi.arrays import dtype_name
from cospadi.evaluation.speed.model_variants import ModelVariant

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
