"""Single layers: the dense product beside every backend, cold weights, contenders taking turns.

What is timed is ``multiply`` of a prepared backend, without the operator around it, whose cost is measured apart.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from cospadi.arrays import dtype_name
from cospadi.backends import BACKENDS, Backend, Placement, explain
from cospadi.errors import NumericalError, UnavailableError
from cospadi.evaluation.speed.backend_memory import scratch_bytes
from cospadi.evaluation.speed.contenders import BASELINES, Contender, contenders_of, graphed
from cospadi.evaluation.speed.dispatch_overhead import measure_dispatch
from cospadi.evaluation.speed.layer_figures import (
    LayerFigures,
    LayerRow,
    LayerSettings,
    MachineRates,
    SkippedBackend,
)
from cospadi.evaluation.speed.machine import bandwidth, cache_bytes, product_rate
from cospadi.evaluation.speed.random_layers import LayerSize, layer_size, random_inputs, random_layer
from cospadi.evaluation.speed.timing import Clock, Rotation, clock_of, median_ratio, spread, take_turns

_WORST_ERROR = 0.1
"""Relative error beyond which a product counts as wrong."""


@torch.no_grad()
def measure_layers(
    settings: LayerSettings, tell: Callable[[str], None] = lambda text: None, clock: Clock | None = None
) -> LayerFigures:
    """Measure layers.

    Parameters
    ----------
    settings : LayerSettings
    tell : callable
        Receives a line per layer.
    clock : Clock, optional
        By default that of the device.

    Raises
    ------
    UnavailableError
        A backend that was asked for cannot run.
    UsageError
        A layer is too small for a ratio.
    NumericalError
        A product is wrong.
    """
    device, clock = settings.device, clock or clock_of(settings.device)
    sizes = [layer_size(shape, ratio, settings.value_dtype) for shape in settings.shapes for ratio in settings.ratios]
    chosen = {dtype: _backends(settings, dtype) for dtype in settings.dtypes}
    tell("measuring memory and products")
    products = {dtype_name(dtype): product_rate(device, dtype) for dtype in settings.dtypes}
    rates = MachineRates(bandwidth(device), cache_bytes(device), products)
    rows: list[LayerRow] = []
    for dtype in settings.dtypes:
        for size in sizes:
            layer = random_layer(size, dtype, device, settings.seed)
            contenders = contenders_of(layer, chosen[dtype][0], Placement(device, dtype), rates.cache_bytes)
            for n_tokens in settings.tokens:
                tell(f"{size.label}, {n_tokens} tokens, {dtype_name(dtype)}, {len(contenders[0].calls)} copies")
                x = random_inputs(n_tokens, size.in_features, dtype, device, settings.seed)
                rows += _rows(contenders, size, x, settings, clock, rates)
            del layer, contenders
    first = settings.dtypes[0]
    chosen_by = {
        f"{name}, {dtype_name(dtype)}": explain(name, device, dtype)
        for dtype in settings.dtypes
        for name in chosen[dtype][0]
        if name == "auto"
    }
    return LayerFigures(
        settings=settings,
        rates=rates,
        rows=rows,
        chosen=chosen_by,
        skipped=[one for dtype in settings.dtypes for one in chosen[dtype][1]],
        dispatch=[measure_dispatch(name, sizes[0], Placement(device, first), clock) for name in chosen[first][0]],
    )


def _backends(settings: LayerSettings, dtype: torch.dtype) -> tuple[dict[str, Backend], list[SkippedBackend]]:
    """Give the backends that can run, and the others with the reason."""
    placement = Placement(settings.device, dtype)
    found: dict[str, Backend] = {}
    skipped: list[SkippedBackend] = []
    probe = random_layer(layer_size((64, 64), 0.3, settings.value_dtype), dtype, settings.device).coefficients
    for name in settings.backends or [name for name in BACKENDS.names() if name != "auto"]:
        state = BACKENDS.availability(name)
        if state:
            backend = BACKENDS.create(name)
            state = backend.supports(probe, placement)
        if state:
            found[name] = backend
        elif name in settings.backends:
            raise UnavailableError(f"backend {name!r} cannot run here in {dtype_name(dtype)}: {state.reason}")
        else:
            skipped.append(SkippedBackend(name, dtype_name(dtype), state.reason))
    return found, skipped


def _rows(
    contenders: list[Contender],
    size: LayerSize,
    x: Tensor,
    settings: LayerSettings,
    clock: Clock,
    rates: MachineRates,
) -> Iterator[LayerRow]:
    """Check and time all contenders for one number of tokens."""
    references = {expected: expected(x) for expected in {one.expected for one in contenders}}
    errors = {one.name: _error(one, x, references[one.expected]) for one in contenders}
    scratch = {one.name: scratch_bytes(partial(one.calls[0], x), x.device) for one in contenders}
    rotations: dict[tuple[str, str], Rotation] = {}
    for one in contenders:
        calls = [partial(call, x) for call in one.calls]
        rotations["eager", one.name] = Rotation(calls)
        if x.device.type == "cuda" and one.graph:
            rotations["graph", one.name] = graphed(calls, x.device)
    times = take_turns(rotations, clock, settings.repeats, settings.turn_seconds)
    by_name = {one.name: one for one in contenders}
    for (mode, name), seconds in times.items():
        one, middle = by_name[name], spread(seconds)
        faster = [median_ratio(times[mode, dense], seconds) if (mode, dense) in times else None for dense in BASELINES]
        rate = one.stored_bytes / middle.median
        yield LayerRow(
            layer=size.label,
            in_features=size.in_features,
            out_features=size.out_features,
            ratio=size.ratio,
            n_atoms=size.n_atoms,
            n_nonzero=size.n_nonzero,
            value_dtype=size.value_dtype,
            dtype=dtype_name(x.dtype),
            n_tokens=x.shape[0],
            contender=name,
            mode=mode,
            microseconds=middle.median * 1e6,
            low=middle.low * 1e6,
            high=middle.high * 1e6,
            times_dense=faster[0],
            times_handwritten=faster[1],
            stored_bytes=one.stored_bytes,
            copies=len(one.calls),
            extra_bytes=one.extra_bytes,
            scratch_bytes=scratch[name],
            gigabytes_per_second=rate / 1e9,
            bandwidth_fraction=rate / rates.bandwidth,
            product_fraction=one.operations * x.shape[0] / middle.median / rates.products[dtype_name(x.dtype)],
            relative_error=errors[name],
            verdict="" if name in BASELINES else verdict(*faster),
        )


def verdict(times_dense: float | None, times_handwritten: float | None) -> str:
    """Say where a contender is slower than a dense product."""
    if times_dense is not None and times_dense < 1:
        return "slower than dense"
    if times_handwritten is not None and times_handwritten < 1:
        return "slower than own dense"
    return ""


def _error(one: Contender, x: Tensor, expected: Tensor) -> float:
    error = float((one.calls[-1](x).double() - expected).norm() / expected.norm())
    if not error < _WORST_ERROR:  # also true for NaN
        raise NumericalError(f"{one.name} gives a wrong product for {x.shape[0]} tokens: relative error {error:.3g}")
    return error
