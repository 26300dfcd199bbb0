"""``SparseLinear``: a linear layer whose weight is a dictionary times sparse coefficients, kept packed as stored."""

from typing import Any

import torch
from torch import Tensor, nn

from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.bundle import Group
from cospadi.backends.dense_products import dense_coefficients, placed
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.formats import (
    FORMATS,
    CheckpointConfig,
    GroupSpec,
    MemberSpec,
    PackedCoefficients,
    PackedDictionary,
    dictionary_layout,
)
from cospadi.models import is_linear, weight_matrix


class SparseLinear(nn.Module):
    """A linear layer y = (x D) S + b that keeps D and S as they are stored.

    With the dictionary on the side of the outputs, y = (x S^T) D^T + b.

    What a backend needs is made on the first call for the device and dtype of x, and again when the layer has moved or
    its tensors have changed.  Conversions such as ``half()`` leave D and S as stored; only the bias follows.  Changes
    through ``.data`` go unnoticed; call ``forget`` after them.

    The factors are frozen.  After ``requires_grad_()`` on ``dictionary`` or ``values`` gradients reach them too (not
    those of 14 bits and whole numbers), on the support that is stored.

    Parameters
    ----------
    group : Group
        Shared by the members; made by ``build_group``.
    member : MemberSpec
        Which of the members this is.
    device : torch.device, optional
        Where to make the empty tensors.
    bias_dtype : torch.dtype, optional
        Of the bias; the default dtype if not given.

    Attributes
    ----------
    dictionary : Parameter, shape ``dictionary_shape`` of the group's description
        In the first member of the group only; of whole numbers a buffer, in strings of bits if they are shorter than 8
        bits, with ``dictionary_scales``.
    coefficient_names, dictionary_names : tuple of str
        Of the tensors that hold S, and, in the first member of the group, D.
    bias : Parameter, shape (out_features,), or None
    """

    dictionary: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        group: Group,
        member: MemberSpec,
        device: torch.device | str | None = None,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        spec = group.spec
        self.member = member
        self.in_features, self.out_features, self.n_atoms = spec.in_features, member.out_features, spec.n_atoms
        self.replaced: type[nn.Module] = nn.Linear
        self._group = group
        self._bundle, self._index = group.join(self)
        self.dictionary_names: tuple[str, ...] = ()
        if group.owner is self:
            layout = dictionary_layout(*spec.dictionary_shape, spec.dictionary_dtype)
            self.dictionary_names = tuple(layout)
            self._hold(layout, device)
        rows, columns = spec.coefficients_shape(member)
        layout = FORMATS.create(spec.format).layout(rows, columns, member.n_stored, spec.value_dtype)
        self.coefficient_names = tuple(layout)
        self._hold(layout, device)
        bias = torch.empty(member.out_features, dtype=bias_dtype, device=device) if member.bias else None
        self.register_parameter("bias", None if bias is None else _frozen(bias))

    def _hold(self, layout: dict[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device | str | None) -> None:
        """Register empty tensors: what is made of integers, and the scales beside them, as buffers."""
        trainable = not any("scales" in name for name in layout)
        for name, (shape, dtype) in layout.items():
            tensor = torch.empty(shape, dtype=dtype, device=device)
            if dtype.is_floating_point and trainable:
                self.register_parameter(name, _frozen(tensor))
            else:
                self.register_buffer(name, tensor)

    @property
    def owner(self) -> "SparseLinear":
        """The member that holds the dictionary."""
        return self._group.owner

    @property
    def backend(self) -> str:
        """Name of the backend that multiplies."""
        return self._bundle.backend.name

    def use_backend(self, name: str) -> None:
        """Choose the backend, by its registry name, for this layer and those that run together with it."""
        self._bundle.backend = BACKENDS.create(name)
        self.forget()

    def forget(self) -> None:
        """Drop what the backend has prepared; the next call prepares it again."""
        self._bundle.forget()
        self._group.forget()

    def packed(self) -> PackedCoefficients:
        """Give the stored coefficients, without copying them: S^T if the dictionary is on the side of the outputs."""
        spec = self._group.spec
        tensors = {local: getattr(self, local) for local in self.coefficient_names}
        return PackedCoefficients(spec.format, *spec.coefficients_shape(self.member), spec.value_dtype, tensors)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply.

        Parameters
        ----------
        x : Tensor, shape (..., in_features), floating

        Returns
        -------
        Tensor, shape (..., out_features)
            In the dtype of x.
        """
        y = self._bundle.linear(x, self._index)
        bias = self._parameters["bias"]  # quicker than the attribute, on a path that every token takes
        return y if bias is None else y + bias.to(y.dtype)

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self._main_tensor.device

    @property
    def _main_tensor(self) -> Tensor:
        """The dictionary, or where none is stored the values of the coefficients."""
        owner = self.owner
        found: Tensor = getattr(owner, "dictionary") if owner.dictionary_names else getattr(self, "values")  # noqa: B009
        return found

    def packed_dictionary(self) -> PackedDictionary:
        """Give the stored dictionary, without copying it."""
        owner = self.owner
        return self._group.held([getattr(owner, name) for name in owner.dictionary_names])

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply out, in float32 or better: the weight, shape (out_features, in_features), as in ``nn.Linear``."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        placement = Placement(self.device, exact)
        with torch.no_grad():
            atoms = placed(self.packed_dictionary(), placement)
            rows = dense_coefficients([self.packed()], placement).rows
            if rows is None:
                return atoms.to(dtype)
            return (atoms @ rows if self._group.spec.side == "output" else rows @ atoms).to(dtype)

    def to_dense_module(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Give a dense layer of the class that this one replaced (``nn.Linear`` or the ``Conv1D`` of transformers).

        Parameters
        ----------
        dtype : torch.dtype, optional
            Of its weight and bias; if not given that of the dictionary, and float32 for whole numbers.
        """
        held = self._main_tensor.dtype
        dtype = dtype or (held if held.is_floating_point else torch.float32)
        weight = self.to_dense(dtype)
        if issubclass(self.replaced, nn.Linear):
            dense: nn.Module = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        else:
            with torch.device("meta"):
                dense = self.replaced(self.out_features, self.in_features)
            weight = weight.T.contiguous()
        dense.weight = nn.Parameter(weight)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype))
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Describe the sizes."""
        spec = self._group.spec
        role = "owner" if self.owner is self else f"borrows from {spec.name}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, n_atoms={self.n_atoms}, "
            f"side={spec.side}, format={spec.format}, value_dtype={spec.value_dtype}, "
            f"dictionary_dtype={spec.dictionary_dtype}, bias={self.bias is not None}, {role}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        """Move, but keep D and S in their stored dtypes: rounding them would be lossy, and x decides the precision."""
        stored = {id(getattr(self, name)) for name in (*self.coefficient_names, *self.dictionary_names)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in stored and moved.dtype != tensor.dtype else moved

        super()._apply(move, recurse)
        self.forget()
        return self


def build_group(
    spec: GroupSpec,
    backend: str = "auto",
    device: torch.device | str | None = None,
    bias_dtype: torch.dtype | None = None,
) -> dict[str, SparseLinear]:
    """Make the layers of a group, empty, by name; the first one holds the dictionary."""
    group = Group(spec, backend)
    return {member.name: SparseLinear(group, member, device, bias_dtype) for member in spec.members}


def install(model: nn.Module, config: CheckpointConfig, backend: str | None = None) -> None:
    """Replace the layers that a checkpoint describes by empty ``SparseLinear`` layers, on the same devices.

    Parameters
    ----------
    model : Module
        A skeleton, for example on the meta device; changed in place.
    config : CheckpointConfig
        The description.
    backend : str, optional
        Registry name; the recommended one if not given.

    Raises
    ------
    CheckpointError
        The model has no such layer, or one of another shape.
    """
    for spec in config.groups:
        places = {member.name: _replaceable(model, spec, member) for member in spec.members}
        first = next(iter(places.values())).get_parameter("weight")
        built = build_group(spec, backend or config.backend, first.device, first.dtype)
        for name, sparse in built.items():
            sparse.replaced = type(places[name])
            sparse.train(places[name].training)
            model.set_submodule(name, sparse)


def sparse_modules(model: nn.Module) -> dict[str, SparseLinear]:
    """Give the compressed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def set_backend(model: nn.Module, name: str) -> None:
    """Run all compressed layers of a model with another backend.

    Raises
    ------
    UnavailableError
        It cannot run on this machine; says why.
    UsageError
        The name is unknown, or the model has no compressed layers.
    """
    state = BACKENDS.availability(name)
    if not state:
        raise UnavailableError(f"backend {name!r} cannot run on this machine: {state.reason}")
    layers = sparse_modules(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} has no compressed layers: nothing to run with backend {name!r}")
    for layer in layers.values():
        layer.use_backend(name)


def restore_dense(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace all compressed layers by dense ones of the classes that they replaced, in place."""
    for name, layer in sparse_modules(model).items():
        model.set_submodule(name, layer.to_dense_module(dtype))


def _replaceable(model: nn.Module, spec: GroupSpec, member: MemberSpec) -> nn.Module:
    try:
        module = model.get_submodule(member.name)
    except AttributeError as error:
        raise CheckpointError(f"the model has no layer {member.name}, which the checkpoint describes") from error
    if not is_linear(module):
        raise CheckpointError(f"{member.name} is a {type(module).__name__}, not a linear layer")
    found = (*weight_matrix(module).shape, module.bias is not None)
    expected = (spec.in_features, member.out_features, member.bias)
    if found != expected:
        raise CheckpointError(
            f"{member.name} has (in_features, out_features, bias) = {found}, the checkpoint describes {expected}"
        )
    return module


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
