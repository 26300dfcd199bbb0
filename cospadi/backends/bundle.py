"""The layers of a group at run time: the prepared factors, and the outputs of several layers from one call."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.backends import operator
from cospadi.backends.base import BACKENDS, Backend, Placement
from cospadi.backends.dense_products import dense_coefficients, placed
from cospadi.backends.prepared import Prepared, Sources, prepare
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.formats import FORMATS, GroupSpec, PackedCoefficients, PackedDictionary, dictionary_layout, held_dictionary


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
        """Add a layer; layers that receive the same input run in one bundle, others alone."""
        if self.owner is None:
            self.owner = layer
        if self._bundle is None or not self.spec.shared_input:
            self._bundle = Bundle(self, self._backend)
        self._bundle.layers.append(layer)
        return self._bundle, len(self._bundle.layers) - 1

    def forget(self) -> None:
        """Drop all that can be computed again."""
        self._prepared: dict[torch.device, Prepared] = {}

    def held(self, tensors: Sequence[Tensor]) -> PackedDictionary:
        """Give the dictionary as it is stored in these tensors, which have the order of ``dictionary_layout``."""
        spec = self.spec
        rows, row_length = spec.dictionary_shape
        names = dictionary_layout(rows, row_length, spec.dictionary_dtype)
        return held_dictionary(dict(zip(names, tensors, strict=True)), row_length, spec.dictionary_dtype)

    def dictionary(self, backend: Backend, placement: Placement, tensors: list[Tensor]) -> Any:
        """Give the dictionary as the backend prepares it; one per device is kept."""
        prepared = self._prepared.get(placement.device)
        if (
            prepared is None
            or prepared.backend != backend
            or not prepared.fits(prepared.backend, placement.dtype, tensors)
        ):
            packed = self.held(tensors)
            prepared = prepare(lambda runner: runner.prepare_dictionary(packed, placement), backend, placement, tensors)
            self._prepared[placement.device] = prepared
        return prepared.state

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}}


@dataclass
class _Outputs:
    """The outputs of all layers for the last input, for the layers that have not asked yet."""

    x: "weakref.ref[Tensor]"
    version: int
    sources: Sources
    parts: tuple[Tensor, ...]
    waiting: set[int]

    def belong_to(self, x: Tensor, version: int, tensors: list[Tensor]) -> bool:
        """Tell whether the outputs belong to this tensor and these layers in their present state."""
        return self.x() is x and self.version == version and self.sources.are(tensors)


class Bundle:
    """Layers that run together: they share their dictionary and receive the same input tensor, or there is one layer.

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
        self._prepared: dict[torch.device, Prepared] = {}
        self._outputs: _Outputs | None = None
        self._trace: tuple[Tensor, tuple[Tensor, ...], set[int]] | None = None
        self._kept: list[tuple[dict[str, Any], str]] | None = None

    def linear(self, x: Tensor, member: int) -> Tensor:
        """Give the output of one layer.

        The outputs of all layers come from one call if the layers receive this same tensor one after the other.  While
        gradients are recorded each layer runs alone, because a shared graph would have to outlive its first use.
        """
        tensors = [place[name] for place, name in self._kept or self._places()]
        recorded = torch.is_grad_enabled() and _needs_gradient(x, *tensors)
        alone = recorded or len(self.layers) == 1
        if torch.compiler.is_compiling():
            return self._product(x, tensors, member) if alone else self._traced(x, tensors, member)
        if recorded or not _is_plain(x):
            return self._product(x, tensors, member)
        if alone:
            return self._run(x, tensors, member)
        last = self._outputs
        version = 0 if x.is_inference() else x._version
        if last is None or member not in last.waiting or not last.belong_to(x, version, tensors):
            parts = torch.split_with_sizes(self._run(x, tensors, -1), self._widths, -1)
            sources = self._prepared[x.device].sources
            last = self._outputs = _Outputs(weakref.ref(x), version, sources, parts, self._members())
        last.waiting.discard(member)
        if not last.waiting:
            self._outputs = None
        return last.parts[member]

    def _traced(self, x: Tensor, tensors: list[Tensor], member: int) -> Tensor:
        """Give the output of one layer while torch.compile traces.

        A trace can hold neither weak references nor versions.  It needs neither, because layers form one bundle only if
        the model passes them one unchanged tensor.
        """
        last = self._trace
        if last is None or last[0] is not x or member not in last[2]:
            y = self._product(x, tensors, -1)
            last = self._trace = (x, torch.split_with_sizes(y, self._widths, -1), self._members())
        last[2].discard(member)
        if not last[2]:
            self._trace = None
        return last[1][member]

    def _members(self) -> set[int]:
        return set(range(len(self.layers)))

    def _product(self, x: Tensor, tensors: list[Tensor], member: int) -> Tensor:
        dictionary, stored = tensors[: self._n_dictionary], tensors[self._n_dictionary :]
        return torch.ops.cospadi.linear.default(x, dictionary, stored, self._handle, member)

    def _places(self) -> list[tuple[dict[str, Any], str]]:
        """Give the dicts and keys of the tensors of D and S; reading attributes of modules takes much longer."""
        if self._kept is None:
            owner = self.group.owner
            named = [(owner, owner.dictionary_names), *((layer, layer.coefficient_names) for layer in self.layers)]
            self._n_dictionary = len(owner.dictionary_names)
            self._widths = [layer.out_features for layer in self.layers]
            self._kept = [
                (layer._parameters if name in layer._parameters else layer._buffers, name)
                for layer, names in named
                for name in names
            ]
        return self._kept

    def width(self, member: int) -> int:
        """Give the output features of one layer, or of all for -1."""
        widths = [layer.out_features for layer in self.layers]
        return sum(widths) if member < 0 else widths[member]

    def run(self, x: Tensor, dictionary: list[Tensor], stored: list[Tensor], member: int) -> Tensor:
        """Multiply; see ``cospadi::linear``."""
        return self._run(x, dictionary + stored, member)

    def _run(self, x: Tensor, tensors: list[Tensor], member: int) -> Tensor:
        prepared = self._prepared.get(x.device)
        if prepared is None or not prepared.fits(self.backend, x.dtype, tensors):
            prepared = self._prepared[x.device] = self._prepare(Placement(x.device, x.dtype), tensors)
        shape = x.shape
        if not shape or shape[-1] != self.group.spec.in_features:
            # The kernels do not check this and would read beyond the input.
            raise UsageError(
                f"{self.layers[max(member, 0)].member.name}: the input has shape {tuple(shape)}, "
                f"its last dimension must be in_features={self.group.spec.in_features}"
            )
        if not x.numel():
            return x.new_zeros((*shape[:-1], self.width(member)))
        dictionary, coefficients, identity = prepared.state
        runner, wanted = prepared.runner, None if member < 0 else member
        flat = len(shape) != 2 and not runner.any_shape
        x = (x.reshape(-1, shape[-1]) if flat else x).contiguous()
        if identity is None:
            y = runner.multiply(dictionary, coefficients, x, wanted)
        else:
            y = runner.multiply(dictionary, identity, runner.multiply(None, coefficients, x, None), None)
        return y.view(*shape[:-1], y.shape[-1]) if flat else y

    def _prepare(self, placement: Placement, tensors: list[Tensor]) -> Prepared:
        self._places()
        dictionary, members = tensors[: self._n_dictionary], self._packed(tensors[self._n_dictionary :])
        for layer, packed in zip(self.layers, members, strict=True):
            state = self.backend.supports(packed, placement)
            if not state:
                raise UnavailableError(f"{layer.member.name}: backend {self.backend.name!r} cannot run: {state.reason}")
            try:
                FORMATS.create(packed.format).check(packed)
            except CheckpointError as error:
                raise CheckpointError(f"{layer.member.name}.{error}") from error

        spec = self.group.spec

        def make(runner: Backend) -> tuple[Any, Any, Any]:
            ready = self.group.dictionary(self.backend, placement, dictionary) if dictionary else None
            coefficients, identity = runner.prepare_coefficients(members, placement), None
            if spec.side == "output":
                width = self.layers[0].out_features
                nothing = PackedCoefficients("identity", width, width, "none", {})
                identity = runner.prepare_coefficients([nothing], placement)
            return ready, coefficients, identity

        return prepare(make, self.backend, placement, tensors)

    def _packed(self, stored: list[Tensor]) -> list[PackedCoefficients]:
        spec, left = self.group.spec, iter(stored)
        return [
            PackedCoefficients(
                spec.format,
                *spec.coefficients_shape(layer.member),
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

        With z = x D: to x (g S^T) D^T, to the dictionary x^T (g S^T), to the values z^T g where they are stored.  With
        the dictionary on the side of the outputs and z = x S^T: to x (g D) S, to the dictionary g^T z, to the values
        x^T (g D).
        """
        placement = Placement(x.device, x.dtype)
        packed = self._packed(stored)
        if self.group.spec.side == "output":
            return self._gradients_of_output_side(gradient, x, dictionary, packed[0], wanted)
        chosen = range(len(packed)) if member < 0 else [member]
        g = gradient.reshape(-1, gradient.shape[-1])
        flat = x.reshape(-1, x.shape[-1])
        D = placed(self.group.held(dictionary), placement)
        parts = dict(zip(chosen, g.split([packed[m].out_features for m in chosen], dim=1), strict=True))
        to_z = g.new_zeros(g.shape[0], D.shape[0])
        for m, part in parts.items():
            to_z += dense_coefficients([packed[m]], placement).multiply_transposed(part)
        found: list[Tensor] = []
        if wanted[0]:
            found.append((to_z @ D).reshape(x.shape))
        if dictionary and wanted[1]:
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

    def _gradients_of_output_side(
        self,
        gradient: Tensor,
        x: Tensor,
        dictionary: list[Tensor],
        packed: PackedCoefficients,
        wanted: list[bool],
    ) -> list[Tensor]:
        placement = Placement(x.device, x.dtype)
        g, flat = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        coefficients = dense_coefficients([packed], placement)
        to_z = g @ placed(self.group.held(dictionary), placement)
        found: list[Tensor] = []
        if wanted[0]:
            found.append(coefficients.multiply_transposed(to_z).reshape(x.shape))
        if wanted[1]:
            found.append((g.T @ coefficients.multiply(flat, None)).to(dictionary[0].dtype))
        codec = FORMATS.create(packed.format)
        for tensor, is_wanted in zip(packed.tensors.values(), wanted[1 + len(dictionary) :], strict=True):
            if is_wanted:
                found.append(codec.gather(packed, flat.T @ to_z).to(tensor.dtype))
        return found

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}, "_outputs": None, "_trace": None, "_kept": None, "_handle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._handle = operator.register(self)


def _is_plain(x: Tensor) -> bool:
    """Tell whether a product can run without torch's dispatcher, which takes as long as a small layer.

    Modes (fake tensors and the like), traces, subclasses, transforms and the meta device need the operator.
    """
    return (
        type(x) is Tensor
        and not x.is_meta
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None  # torch.jit.trace, which would record memory but not the kernels
    )


def _needs_gradient(*tensors: Tensor) -> bool:
    return any(tensor.requires_grad for tensor in tensors)
