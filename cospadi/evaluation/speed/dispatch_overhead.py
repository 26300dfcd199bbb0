"""What a layer's call costs beyond its backend's product: module, operator and bookkeeping."""

import statistics
from dataclasses import dataclass

import torch

from cospadi.arrays import dtype_name
from cospadi.backends import BACKENDS, Placement, SparseLinear, build_group
from cospadi.evaluation.speed.contenders import prepare
from cospadi.evaluation.speed.random_layers import FORMAT, Layer, LayerSize, random_inputs, random_layer
from cospadi.evaluation.speed.timing import Clock, Rotation, clock_of, take_turns
from cospadi.formats import GroupSpec, MemberSpec, dictionary_dtype_of, dictionary_tensors

_CALLS = 200
"""Calls of a turn; one alone takes less than a clock can tell."""


@dataclass(frozen=True)
class DispatchOverhead:
    """One token through a whole layer beside ``multiply`` alone, both with warm weights.

    Attributes
    ----------
    backend, layer, dtype : str
    module, multiply : float
        Medians in microseconds.
    overhead : float
        Median of their differences within a repeat, in microseconds.
    """

    backend: str
    layer: str
    dtype: str
    module: float
    multiply: float
    overhead: float


@torch.no_grad()
def measure_dispatch(
    name: str, size: LayerSize, placement: Placement, clock: Clock | None = None, repeats: int = 9
) -> DispatchOverhead:
    """Measure what a layer's call costs beyond the product.

    Parameters
    ----------
    name : str
        Registry name of the backend.
    size : LayerSize
        A small layer shows best what does not depend on its size.
    placement : Placement
    clock : Clock, optional
    repeats : int
    """
    layer = random_layer(size, placement.dtype, placement.device)
    module, backend = sparse_linear(layer, name, placement.device), BACKENDS.create(name)
    state = prepare(backend, layer, placement)
    x = random_inputs(1, size.in_features, placement.dtype, placement.device)
    calls = {"module": lambda: module(x), "multiply": lambda: backend.multiply(*state, x, None)}
    rotations = {kind: Rotation([call] * _CALLS) for kind, call in calls.items()}
    times = take_turns(rotations, clock or clock_of(placement.device), repeats)
    differences = [whole - part for whole, part in zip(times["module"], times["multiply"], strict=True)]
    return DispatchOverhead(
        backend=name,
        layer=size.label,
        dtype=dtype_name(placement.dtype),
        module=statistics.median(times["module"]) * 1e6,
        multiply=statistics.median(times["multiply"]) * 1e6,
        overhead=statistics.median(differences) * 1e6,
    )


def sparse_linear(layer: Layer, backend: str, device: torch.device) -> SparseLinear:
    """Make the layer that a loaded model would have."""
    size = layer.size
    spec = GroupSpec(
        in_features=size.in_features,
        n_atoms=size.n_atoms,
        members=(MemberSpec("layer", size.out_features, size.n_nonzero * size.out_features),),
        format=FORMAT,
        value_dtype=size.value_dtype,
        dictionary_dtype=dictionary_dtype_of(size.value_dtype),
        shared_input=True,
        side="input",
    )
    module = build_group(spec, backend, device)["layer"]
    for name, tensor in (dictionary_tensors(layer.dictionary) | layer.coefficients.tensors).items():
        getattr(module, name).copy_(tensor)
    return module
