"""The layers of a group at run time: what a backend prepared for them, and outputs that come from one call."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.backends import operator
from cospadi.backends.base import BACKENDS, Backend, Placement
from cospadi.backends.dense_products import placed, unpacked
from cospadi.errors import CheckpointError, UnavailableError
from cospadi.factorization import GroupSpec
from cospadi.formats.base import FORMATS, PackedCoefficients, PackedDictionary


@dataclass(frozen=True)
class _Prepared:
    """What a backend made of stored tensors, and of which versions of which tensors."""

    state: Any
    backend: Backend
    placement: Placement
    sources: tuple[Tensor, ...]
    marks: tuple[tuple[int, int], ...]

    def fits(self, backend: Backend, placement: Placement, tensors: Sequence[Tensor]) -> bool:
        """Tell whether it was made by this backend, for this place and of these tensors as they now are."""
        if self.backend is not backend or self.placement != placement:
            return False
        return all(_mark(tensor) == mark for tensor, mark in zip(tensors, self.marks, strict=True))


def _mark(tensor: Tensor) -> tuple[int, int]:
    """Tell a tensor's memory and state: its address (kept from reuse by whoever holds it) and its count of changes."""
    return tensor.data_ptr(), _version(tensor)


def _prepare(make: Callable[[], Any], backend: Backend, placement: Placement, tensors: Sequence[Tensor]) -> _Prepared:
    """Let a backend prepare, outside of any gradient or inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        state = make()
    return _Prepared(state, backend, placement, tuple(tensors), tuple(_mark(tensor) for tensor in tensors))


class Group:
    """The dictionary that layers share.

    A plain object, so that a borrower's reference to the owner registers no submodule; a deep copy of a model copies it
    with the rest.

    Parameters
    ----------
    spec : GroupSpec
        The description.
    backend : str
        Registry name.

    Attributes
    ----------
    owner : Module
        The layer that holds the dictionary; the first that joins.
    """

    def __init__(self, spec: GroupSpec, backend: str = "auto") -> None:
        self.spec = spec
        self.owner: Any = None
        self._backend = BACKENDS.create(backend)
        self._bundle: Bundle | None = None
        self.forget()

    def join(self, layer: Any) -> "tuple[Bundle, int]":
        """Take a layer in; layers that receive the same input run in one bundle, others alone."""
        if self.owner is None:
            self.owner = layer
        if self._bundle is None or not self.spec.shared_input:
            self._bundle = Bundle(self, self._backend)
        self._bundle.layers.append(layer)
        return self._bundle, len(self._bundle.layers) - 1

    def forget(self) -> None:
        """Drop all that can be computed again."""
        self._prepared: dict[torch.device, _Prepared] = {}

    def dictionary(self, backend: Backend, placement: Placement, tensors: list[Tensor]) -> Any:
        """Give the dictionary as the backend prepares it; one per device is kept."""
        prepared = self._prepared.get(placement.device)
        if prepared is None or not prepared.fits(backend, placement, tensors):
            packed = PackedDictionary(*tensors)
            prepared = _prepare(lambda: backend.prepare_dictionary(packed, placement), backend, placement, tensors)
            self._prepared[placement.device] = prepared
        return prepared.state

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}


@dataclass
class _Outputs:
    """The outputs of all layers for the last input, for the layers that have not asked yet."""

    x: Any
    version: int
    y: Tensor
    waiting: set[int]


class Bundle:
    """Layers that run together: they share their dictionary and receive the very same input, or there is one layer.

    Parameters
    ----------
    group : Group
    backend : Backend

    Attributes
    ----------
    layers : list of SparseLinear
        In the order in which they joined.
    """

    def __init__(self, group: Group, backend: Backend) -> None:
        self.group = group
        self.backend = backend
        self.layers: list[Any] = []
        self._handle = operator.register(self)
        self.forget()

    def forget(self) -> None:
        """Drop all that can be computed again."""
        self._prepared: dict[torch.device, _Prepared] = {}
        self._outputs: _Outputs | None = None

    def linear(self, x: Tensor, member: int) -> Tensor:
        """Give the output of one layer.

        The outputs of all layers come from one call when they receive this very tensor one after the other, unless
        gradients are recorded, whose graph would have to outlive its use.
        """
        dictionary = _tensors(self.group.owner, self.group.owner.dictionary_names)
        stored = [tensor for layer in self.layers for tensor in _tensors(layer, layer.coefficient_names)]
        product = torch.ops.cospadi.linear.default
        if len(self.layers) == 1 or (torch.is_grad_enabled() and _needs_gradient(x, *dictionary, *stored)):
            return product(x, dictionary, stored, self._handle, member)
        last = self._outputs
        if last is None or member not in last.waiting or not _same(last, x):
            y = product(x, dictionary, stored, self._handle, -1)
            last = self._outputs = _remember(x, y, len(self.layers))
        y = last.y
        last.waiting.discard(member)
        if not last.waiting:
            self._outputs = None
        start = sum(layer.out_features for layer in self.layers[:member])
        return y[..., start : start + self.layers[member].out_features]

    def width(self, member: int) -> int:
        """Give the output features of one layer, or of all for -1."""
        widths = [layer.out_features for layer in self.layers]
        return sum(widths) if member < 0 else widths[member]

    def run(self, x: Tensor, dictionary: list[Tensor], stored: list[Tensor], member: int) -> Tensor:
        """Multiply; see ``cospadi::linear``."""
        placement = Placement(x.device, x.dtype)
        prepared = self._prepared.get(x.device)
        if prepared is None or not prepared.fits(self.backend, placement, stored):
            prepared = self._prepared[x.device] = self._prepare(placement, stored)
        ready = self.group.dictionary(self.backend, placement, dictionary)
        flat = x.reshape(-1, x.shape[-1])
        if not flat.shape[0]:
            return x.new_zeros((*x.shape[:-1], self.width(member)))
        y = self.backend.multiply(ready, prepared.state, flat.contiguous(), None if member < 0 else member)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _prepare(self, placement: Placement, stored: list[Tensor]) -> _Prepared:
        members = self._packed(stored)
        for layer, packed in zip(self.layers, members, strict=True):
            state = self.backend.supports(packed, placement)
            if not state:
                raise UnavailableError(f"{layer.member.name}: backend {self.backend.name!r} cannot run: {state.reason}")
            try:
                FORMATS.create(packed.format).check(packed)
            except CheckpointError as error:
                raise CheckpointError(f"{layer.member.name}.{error}") from error
        make = lambda: self.backend.prepare_coefficients(members, placement)  # noqa: E731
        return _prepare(make, self.backend, placement, stored)

    def _packed(self, stored: list[Tensor]) -> list[PackedCoefficients]:
        spec, left = self.group.spec, iter(stored)
        return [
            PackedCoefficients(
                spec.format,
                spec.n_atoms,
                layer.out_features,
                spec.value_dtype,
                {name: next(left) for name in layer.coefficient_names},
            )
            for layer in self.layers
        ]

    def gradients(
        self,
        gradient: Tensor,
        x: Tensor,
        dictionary: list[Tensor],
        stored: list[Tensor],
        member: int,
        wanted: list[bool],
    ) -> list[Tensor]:
        """Give the gradients to x, to the dictionary and to the stored values, by dense products.

        With z = x D: to x (g S^T) D^T, to the dictionary x^T (g S^T), to the values z^T g where they are stored.
        """
        placement = Placement(x.device, x.dtype)
        packed = self._packed(stored)
        chosen = range(len(packed)) if member < 0 else [member]
        g = gradient.reshape(-1, gradient.shape[-1])
        flat = x.reshape(-1, x.shape[-1])
        D = placed(PackedDictionary(*dictionary), placement)
        parts = dict(zip(chosen, g.split([packed[m].out_features for m in chosen], dim=1), strict=True))
        to_z = g.new_zeros(g.shape[0], D.shape[0])
        for m, part in parts.items():
            to_z += part @ unpacked(packed[m], placement)
        found: list[Tensor] = []
        if wanted[0]:
            found.append((to_z @ D).reshape(x.shape))
        if wanted[1]:
            found.append((to_z.T @ flat).to(dictionary[0].dtype))
        z = flat @ D.T if any(wanted[1 + len(dictionary) :]) else None
        flags = iter(wanted[1 + len(dictionary) :])
        for m, coefficients in enumerate(packed):
            for tensor in coefficients.tensors.values():
                if not next(flags):
                    continue
                if m not in parts or z is None:
                    found.append(torch.zeros_like(tensor))
                else:
                    to_entries = z.T @ parts[m]
                    found.append(FORMATS.create(coefficients.format).gather(coefficients, to_entries).to(tensor.dtype))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}, "_outputs": None, "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = operator.register(self)


def _remember(x: Tensor, y: Tensor, n_layers: int) -> _Outputs:
    # A trace can hold neither weak references nor versions, and needs neither: what it holds ends with it, and layers
    # are joined only where the model was seen to pass them one unchanged tensor.
    traced = torch.compiler.is_compiling()
    return _Outputs(x if traced else weakref.ref(x), 0 if traced else _version(x), y, set(range(n_layers)))


def _same(last: _Outputs, x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return last.x is x
    return isinstance(last.x, weakref.ref) and last.x() is x and last.version == _version(x)


def _version(tensor: Tensor) -> int:
    """Count a tensor's changes in place; tensors made in inference mode keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def _tensors(layer: nn.Module, names: Sequence[str]) -> list[Tensor]:
    """Give tensors of a layer without the detour through ``Module.__getattr__``, which costs more than the lookups."""
    parameters, buffers = layer._parameters, layer._buffers
    return [parameters[name] if name in parameters else buffers[name] for name in names]  # type: ignore[misc]


def _needs_gradient(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
