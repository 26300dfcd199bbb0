"""The numbers of tokens up to which kernels that read packed coefficients are faster than dense products."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cospadi.arrays import dtype_name
from cospadi.backends import BACKENDS, Placement, Tuned, tuned
from cospadi.errors import UnavailableError
from cospadi.evaluation.speed.contenders import n_copies, prepare, products
from cospadi.evaluation.speed.machine import cache_bytes
from cospadi.evaluation.speed.random_layers import Layer, Shape, layer_size, random_inputs, random_layer
from cospadi.evaluation.speed.timing import Clock, Rotation, clock_of, median_ratio, take_turns

_SHAPES: dict[str, tuple[Shape, ...]] = {"cpu": ((576, 1536), (2048, 2048)), "cuda": ((4096, 4096), (4096, 14336))}
DTYPES = {
    "cpu": (torch.bfloat16, torch.float32, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}
TOKENS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
_RATIO = 0.3
_LOST, _LOST_AFTER = 0.9, 3
"""Below this advantage, so many times in a row, the kernel has lost; noise alone would not do that."""
_ALWAYS = 1 << 30
"""More tokens than any call has: with this threshold the kernel is always chosen."""


@dataclass(frozen=True)
class Crossover:
    """One threshold that was measured.

    Attributes
    ----------
    backend, option, dtype : str
    value : int or None
        Most tokens for which the kernel is chosen; None if the kernel was still ahead when the time was spent.
    advantage : dict of int to float
        By number of tokens, the time of the dense product / that of the kernel, geometric mean over the shapes.
    """

    backend: str
    option: str
    dtype: str
    value: int | None
    advantage: dict[int, float]


@torch.no_grad()
def measure_crossovers(
    device: torch.device,
    seconds: float = 100.0,
    tell: Callable[[str], None] = lambda text: None,
    clock: Clock | None = None,
    now: Callable[[], float] = time.monotonic,
) -> list[Crossover]:
    """Measure the thresholds of a device's backend.

    Parameters
    ----------
    device : torch.device
        A CPU or an NVIDIA GPU.
    seconds : float
        Approximate time for the whole measurement; larger numbers of tokens are left out when it is spent.
    tell : callable
        Receives a line per threshold.
    clock : Clock, optional
        By default that of the device.
    now : callable
        Gives the time in seconds, for the limit.

    Returns
    -------
    list of Crossover

    Raises
    ------
    UnavailableError
        The backend cannot run.
    """
    if device.type not in _SHAPES:
        raise UnavailableError(f"device {str(device)!r} has no backend with thresholds: give cpu or cuda")
    state = BACKENDS.availability(device.type)
    if not state:
        raise UnavailableError(f"backend {device.type!r} cannot run here: {state.reason}")
    options = ("max_tokens",) if device.type == "cpu" else ("project_tokens", "combine_tokens")
    dtypes = DTYPES[device.type]
    found: list[Crossover] = []
    until = now()
    for dtype in dtypes:
        sizes = [layer_size(shape, _RATIO) for shape in _SHAPES[device.type]]
        layers = [random_layer(size, dtype, device) for size in sizes]
        known: dict[str, int] = {}
        for option in options:
            until += seconds / (len(dtypes) * len(options))
            ways = ways_of(option, options, known)
            go_on = partial(_before, until, now)
            measured = _advantages(layers, ways, Placement(device, dtype), clock or clock_of(device), go_on)
            value = threshold(measured)
            where = f"{device.type}, {dtype_name(dtype)}"
            if value == max(measured) < TOKENS[-1]:
                # The shipped threshold is a better guess than the number of tokens at which the time was spent.
                found.append(Crossover(device.type, option, dtype_name(dtype), None, measured))
                tell(
                    f"{where}: {option} is left as it is: still ahead at {value} tokens when the time was spent; "
                    "give more --seconds"
                )
            else:
                known[option] = value
                found.append(Crossover(device.type, option, dtype_name(dtype), value, measured))
                tell(f"{where}: {option} = {value}")
    return found


def tuned_thresholds(device: torch.device, found: Sequence[Crossover]) -> list[Tuned]:
    """Join the thresholds of each dtype for ``store_tuned``; those that were not found are left out."""
    options: dict[tuple[str, str], dict[str, int]] = {}
    for one in found:
        if one.value is not None:
            options.setdefault((one.backend, one.dtype), {})[one.option] = one.value
    return [tuned(backend, device, getattr(torch, dtype), values) for (backend, dtype), values in options.items()]


def ways_of(option: str, options: Sequence[str], known: Mapping[str, int]) -> dict[int, dict[str, int]]:
    """Give a backend's options with and without the kernel of one option; the other options keep their known values."""
    others = {other: known.get(other, _ALWAYS) for other in options if other != option}
    return {limit: {**others, option: limit} for limit in (_ALWAYS, 0)}


def threshold(advantage: Mapping[int, float]) -> int:
    """Give the number of tokens up to which to choose the kernel; 0 for never.

    It minimises the product of all times.  Noise at a single number of tokens changes that little, whereas a search for
    the first number at which the kernel loses would stop there.

    Parameters
    ----------
    advantage : mapping of int to float
        By number of tokens, time without / time with the kernel.
    """
    best, gained, most = 0, 0.0, 0.0
    for n_tokens in sorted(advantage):
        gained += math.log(advantage[n_tokens])
        if gained > most:
            best, most = n_tokens, gained
    return best


def lost(advantage: Mapping[int, float]) -> bool:
    """Tell whether the kernel is clearly slower at the largest numbers of tokens, so that more need not be tried."""
    last = [advantage[n_tokens] for n_tokens in sorted(advantage)[-_LOST_AFTER:]]
    return len(last) == _LOST_AFTER and max(last) < _LOST


def _advantages(
    layers: Sequence[Layer],
    ways: Mapping[int, dict[str, int]],
    placement: Placement,
    clock: Clock,
    go_on: Callable[[], bool],
) -> dict[int, float]:
    """Give time without / time with the kernel by ascending number of tokens, as far as ``go_on`` allows."""
    name, device = placement.device.type, placement.device
    backends = {limit: BACKENDS.create(name, options) for limit, options in ways.items()}
    prepared = []
    for layer in layers:
        count = n_copies(layer.size.stored_bytes, 2 * layer.size.stored_bytes, cache_bytes(device), device)
        copies = [layer, *(layer.copy() for _ in range(count - 1))]
        # The thresholds have no effect on what is prepared, so both ways share it.
        prepared.append([prepare(backends[_ALWAYS], copy, placement) for copy in copies])
    found: dict[int, float] = {}
    for n_tokens in TOKENS:
        if found and (lost(found) or not go_on()):
            break
        logs = []
        for layer, states in zip(layers, prepared, strict=True):
            x = random_inputs(n_tokens, layer.size.in_features, placement.dtype, device)
            rotations = {
                limit: Rotation([partial(call, x) for call in products(backend, states)])
                for limit, backend in backends.items()
            }
            times = take_turns(rotations, clock, repeats=7, turn_seconds=0.02)
            logs.append(math.log(median_ratio(times[0], times[_ALWAYS])))
        found[n_tokens] = math.exp(sum(logs) / len(logs))
    return found


def _before(until: float, now: Callable[[], float]) -> bool:
    return now() < until
