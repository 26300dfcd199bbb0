"""Dense and compressed products, prepared on as many copies of their weights as keep them out of the cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.backends import BACKENDS, Backend, Placement
from cospadi.evaluation.speed.backend_memory import extra_bytes
from cospadi.evaluation.speed.random_layers import Layer
from cospadi.evaluation.speed.timing import Call, Rotation

DENSE = "dense torch"
HANDWRITTEN = "dense hand-written"
BASELINES = (DENSE, HANDWRITTEN)

_LEAST_COLD_BYTES = {"cpu": 96 << 20, "cuda": 0}
_MOST_COPIES = 200
_MOST_BYTES = 3 << 29
"""1.5 GiB for the copies of all contenders."""

State = tuple[Any, Any]
"""Dictionary and coefficients as a backend prepared them."""


@dataclass(frozen=True)
class Contender:
    """One way to multiply.

    Attributes
    ----------
    name : str
    calls : sequence of callable
        Give y from x, each by its own copy of the weights.
    expected : callable
        Gives y in float64 from x.
    stored_bytes : int
        Of the weights as stored.
    extra_bytes : int
        Kept by the backend besides.
    operations : int
        Of two dense products (or one) for one token.
    graph : bool
        Whether the calls can be captured in a CUDA graph.
    """

    name: str
    calls: Sequence[Callable[[Tensor], Tensor]]
    expected: Callable[[Tensor], Tensor]
    stored_bytes: int
    extra_bytes: int
    operations: int
    graph: bool


def contenders_of(
    layer: Layer, backends: Mapping[str, Backend], placement: Placement, last_cache: int
) -> list[Contender]:
    """Prepare the dense products and the backends, on enough copies to keep the weights out of the cache.

    Parameters
    ----------
    layer : Layer
    backends : mapping of str to Backend
        By registry name.
    placement : Placement
    last_cache : int
        Bytes of the last-level cache.
    """
    size, weight_bytes = layer.size, layer.weight.nbytes
    first = {name: prepare(backend, layer, placement) for name, backend in backends.items()}
    extra = {name: extra_bytes(state, layer.stored) for name, state in first.items()}
    per_copy = weight_bytes + size.stored_bytes + sum(extra.values())
    count = n_copies(min(size.stored_bytes, weight_bytes), per_copy, last_cache, placement.device)
    copies = [layer, *(layer.copy() for _ in range(count - 1))]
    d1, k, d2 = size.in_features, size.n_atoms, size.out_features
    found = []
    for name, product in _dense_products(placement):
        calls = [partial(product, copy.weight) for copy in copies]
        found.append(Contender(name, calls, layer.expected_dense, weight_bytes, 0, 2 * d1 * d2, True))
    for name, backend in backends.items():
        states = [first[name], *(prepare(backend, copy, placement) for copy in copies[1:])]
        # cupy takes memory from a pool of its own, which a graph of torch does not capture.
        found.append(
            Contender(
                name,
                products(backend, states),
                layer.expected,
                size.stored_bytes,
                extra[name],
                2 * k * (d1 + d2),
                name != "cupy",
            )
        )
    return found


def prepare(backend: Backend, layer: Layer, placement: Placement) -> State:
    """Let a backend prepare a layer."""
    return (
        backend.prepare_dictionary(layer.dictionary, placement),
        backend.prepare_coefficients([layer.coefficients], placement),
    )


def products(backend: Backend, states: Sequence[State]) -> list[Callable[[Tensor], Tensor]]:
    """Give the products with prepared layers as functions of x."""
    return [partial(_multiply, backend, state) for state in states]


def n_copies(smallest: int, per_copy: int, last_cache: int, device: torch.device) -> int:
    """Count the copies of a layer that keep it out of the cache between two uses.

    Parameters
    ----------
    smallest : int
        Bytes of the smallest contender.
    per_copy : int
        Bytes of all contenders.
    last_cache : int
        Bytes of the last-level cache.
    device : torch.device
    """
    wanted = max(2 * last_cache + 1, _LEAST_COLD_BYTES.get(device.type, 0))
    return max(2, min(-(-wanted // smallest), _MOST_COPIES, _MOST_BYTES // per_copy))


def graphed(calls: Sequence[Call], device: torch.device) -> Rotation:
    """Capture all calls in one CUDA graph, so that a replay goes through all copies."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Rotation([graph.replay], len(calls))


def _dense_products(placement: Placement) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    """Give the dense products that exist here, as functions of the weight and x."""
    yield DENSE, _linear
    if placement.device.type == "cpu" and placement.dtype == torch.bfloat16 and BACKENDS.availability("cpu"):
        from cospadi.backends.cpu import dense_bf16, levels

        if "avx512" in levels():
            yield HANDWRITTEN, dense_bf16


def _linear(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


def _multiply(backend: Backend, state: State, x: Tensor) -> Tensor:
    return backend.multiply(*state, x, None)
