"""The figures of single layers: what to measure, and what was found."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cospadi.arrays import dtype_name
from cospadi.evaluation.speed.dispatch_overhead import DispatchOverhead
from cospadi.evaluation.speed.random_layers import Shape

METHOD = (
    "microseconds of backend.multiply on prepared layers, without the operator cospadi::linear; the calls of a turn go "
    "through copies of the weights, and all contenders have a turn in every repeat; ratios are medians of the ratios "
    "within a repeat; bandwidth is that of torch's sum of a large tensor on a CPU, of a copy on a GPU"
)


@dataclass(frozen=True)
class LayerSettings:
    """What to measure.

    Attributes
    ----------
    shapes : tuple of (in_features, out_features)
    ratios : tuple of float
        Fractions of the bfloat16 bytes that are removed.
    tokens : tuple of int
        Numbers of tokens.
    dtypes : tuple of torch.dtype
        Of the inputs and of the dense weights.
    value_dtype : str
        Of the coefficients, see ``VALUE_BITS``.
    backends : tuple of str
        Registry names; empty for all but ``auto`` that can run.
    device : torch.device
    repeats : int
    turn_seconds : float
        Most seconds of a turn, unless one call takes longer.
    seed : int
        Of the random factors and inputs.
    """

    shapes: tuple[Shape, ...]
    ratios: tuple[float, ...] = (0.3,)
    tokens: tuple[int, ...] = (1, 8, 512)
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    value_dtype: str = "bfloat16"
    backends: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 9
    turn_seconds: float = 0.1
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self) | {"dtypes": list(map(dtype_name, self.dtypes)), "device": str(self.device)}


@dataclass(frozen=True)
class LayerRow:
    """One contender on one layer with one number of tokens.

    Attributes
    ----------
    layer : str
        Shape and ratio.
    in_features, out_features, ratio, n_atoms, n_nonzero, value_dtype
        See ``LayerSize``.
    dtype : str
        Of the input.
    n_tokens : int
    contender : str
        ``dense torch``, ``dense hand-written`` or a backend.
    mode : {"eager", "graph"}
        ``graph``: replayed from a CUDA graph.
    microseconds, low, high : float
        Median and quartiles over the repeats.
    times_dense, times_handwritten : float or None
        How many times faster than each dense product: its time / this time.
    stored_bytes : int
        Of the weights as stored.
    copies : int
        Through which the calls of a turn go; weights are cold if all of them are more than twice the cache.
    extra_bytes : int
        What the backend keeps besides.
    scratch_bytes : int
        What the call takes besides its result.
    gigabytes_per_second : float
        Stored bytes / time.
    bandwidth_fraction : float
        Of the measured bandwidth.
    product_fraction : float
        Of the measured rate of dense products, zeros of S counted as work.
    relative_error : float
        Against float64 with the same stored numbers.
    verdict : str
        ``slower than dense`` where it is; ``slower than own dense`` where it is only faster than torch's product.
    """

    layer: str
    in_features: int
    out_features: int
    ratio: float
    n_atoms: int
    n_nonzero: int
    value_dtype: str
    dtype: str
    n_tokens: int
    contender: str
    mode: str
    microseconds: float
    low: float
    high: float
    times_dense: float | None
    times_handwritten: float | None
    stored_bytes: int
    copies: int
    extra_bytes: int
    scratch_bytes: int
    gigabytes_per_second: float
    bandwidth_fraction: float
    product_fraction: float
    relative_error: float
    verdict: str


@dataclass(frozen=True)
class MachineRates:
    """What the machine can do.

    Attributes
    ----------
    bandwidth : float
        Bytes per second.
    cache_bytes : int
        Of the last-level cache.
    products : dict of str to float
        By dtype, floating-point operations per second of dense products.
    """

    bandwidth: float
    cache_bytes: int
    products: dict[str, float]


@dataclass(frozen=True)
class SkippedBackend:
    """A backend that cannot run here in a dtype, and why."""

    backend: str
    dtype: str
    reason: str


@dataclass(frozen=True)
class LayerFigures:
    """The result of ``measure_layers``.

    Attributes
    ----------
    settings : LayerSettings
    rates : MachineRates
    rows : list of LayerRow
    chosen : dict of str to str
        What ``auto`` chose, by dtype.
    skipped : list of SkippedBackend
    dispatch : list of DispatchOverhead
        One per backend.
    method : str
        What the figures are, in words.
    """

    settings: LayerSettings
    rates: MachineRates
    rows: list[LayerRow]
    chosen: dict[str, str]
    skipped: list[SkippedBackend]
    dispatch: list[DispatchOverhead]
    method: str = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self) | {"settings": self.settings.to_dict()}
