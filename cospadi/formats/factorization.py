"""The values that pass between the stages: a factorised group of layers and its description.

Throughout, ``W`` is (in_features, out_features), the transpose of ``torch.nn.Linear.weight``; the dictionary ``D`` is
(in_features, n_atoms) with atoms as columns; the coefficients ``S`` are (n_atoms, out_features), sparse by column.
On the side of the outputs the two are those of W^T.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cospadi.errors import CheckpointError

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")
"""Which side of the weight the dictionary is on."""


@dataclass(frozen=True)
class SparseFactorization:
    """One dictionary and the coefficients of each layer that shares it.

    Attributes
    ----------
    dictionary : Tensor, shape (in_features, n_atoms), floating
        Atoms are columns, in the space of the layer's inputs (not whitened).
    coefficients : dict of str to Tensor, shape (n_atoms, out_features of the member), floating
        By the member layer's name, in the order of the model.  Zeros outside the support.
    dictionary_scales : Tensor or None
        Where the atoms already lie on a grid of few bits: its scales, of the shape that ``scale_shape`` of
        ``cospadi.formats.quantization`` gives for atoms as rows.  Packing then takes these and not scales of its own.
    coefficient_scales : dict of str to Tensor, shape (out_features of the member,), or None
        The same for the columns of S, by member; members that are left out have none.
    side : {"input", "output"}
        ``output``: the factors are those of the transpose, W^T = D S, for one member; D is (out_features, n_atoms) and
        S (n_atoms, in_features).  Scales then belong to the rows of D, one or more for each output, and to those of S,
        one for each atom.
    """

    dictionary: Tensor
    coefficients: dict[str, Tensor]
    dictionary_scales: Tensor | None = None
    coefficient_scales: dict[str, Tensor] | None = None
    side: Side = "input"

    def __post_init__(self) -> None:
        if self.dictionary.ndim != 2 or not self.coefficients:
            raise ValueError(
                f"expected a 2-D dictionary and at least one member, got shape {tuple(self.dictionary.shape)}"
            )
        for name, coefficients in self.coefficients.items():
            if coefficients.ndim != 2 or coefficients.shape[0] != self.n_atoms:
                raise ValueError(
                    f"{name}: coefficients of shape {tuple(coefficients.shape)} do not fit {self.n_atoms} atoms"
                )
        if self.side not in SIDES or (self.side == "output" and len(self.coefficients) != 1):
            raise ValueError(
                f"side {self.side!r} with {len(self.coefficients)} members: expected {SIDES}, one for 'output'"
            )
        # With the dictionary on the side of the outputs both factors are stored the other way round.
        transposed = self.side == "output"
        rows = self.dictionary.shape[0 if transposed else 1]
        if self.dictionary_scales is not None and self.dictionary_scales.shape[:1] != (rows,):
            what = "outputs" if transposed else "atoms"
            raise ValueError(f"scales of shape {tuple(self.dictionary_scales.shape)} do not fit {rows} {what}")
        for name, scales in (self.coefficient_scales or {}).items():
            if name not in self.coefficients or scales.shape != (
                self.coefficients[name].shape[0 if transposed else 1],
            ):
                raise ValueError(f"{name}: scales of shape {tuple(scales.shape)} fit no coefficients")

    @classmethod
    def of_weight(cls, name: str, weight: Tensor, scales: Tensor | None = None) -> "SparseFactorization":
        """Give a layer that is only quantised: the weight as dictionary and the identity as coefficients.

        Parameters
        ----------
        name : str
            Of the layer.
        weight : Tensor, shape (in_features, out_features), floating
            Rounded by ``pack_group`` in the format ``identity``, or already on the grid of the scales.
        scales : Tensor, optional
            See ``dictionary_scales``; the outputs are the atoms.
        """
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return cls(weight, {name: identity}, dictionary_scales=scales)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.dictionary.shape[0] if self.side == "input" else next(iter(self.coefficients.values())).shape[1]

    @property
    def n_atoms(self) -> int:
        """Number of atoms (columns) of the dictionary."""
        return self.dictionary.shape[1]

    def to_dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply out one member: W, shape (in_features, out_features)."""
        found = self.dictionary.to(dtype) @ self.coefficients[name].to(dtype)
        return found if self.side == "input" else found.T

    def joined(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply out all members, side by side."""
        return torch.cat([self.to_dense(name, dtype) for name in self.coefficients], dim=1)


@dataclass(frozen=True)
class MemberSpec:
    """What a checkpoint's config says of one layer of a group.

    Attributes
    ----------
    name : str
        Dotted module name.
    out_features : int
        Width of the output.
    n_stored : int
        Coefficients stored (for ``bitmask`` and ``csr`` the non-zeros, for ``dense`` all, for ``identity`` none).
    bias : bool
        Whether the layer has a bias.
    """

    name: str
    out_features: int
    n_stored: int
    bias: bool = False


@dataclass(frozen=True)
class GroupSpec:
    """What a checkpoint's config says of one group of layers; enough to rebuild the modules empty.

    Attributes
    ----------
    in_features, n_atoms : int
        Width of the input and number of atoms.
    members : tuple of MemberSpec
        The layers; the first one owns the dictionary's tensor in the checkpoint.
    format : str
        Name of the coefficients' format.
    value_dtype : str
        Of the coefficients: ``bfloat16``, ``float16``, ``float32``, ``bfloat14``, ``int8``, ``int6`` or ``int4``, and
        ``none`` for the format ``identity``.
    dictionary_dtype : str
        ``bfloat16``, ``float16``, ``float32``, ``int8``, one such as ``int4g64``, or ``none`` for the identity.
    shared_input : bool
        Whether the members receive the same input tensor, so that x D is computed once for all.
    side : {"input", "output"}
        Which side of the weight the dictionary is on, see ``SparseFactorization``; ``output`` has one member only.
    """

    in_features: int
    n_atoms: int
    members: tuple[MemberSpec, ...]
    format: str
    value_dtype: str
    dictionary_dtype: str
    shared_input: bool
    side: Side

    @property
    def name(self) -> str:
        """The name of the first member, which names the group."""
        return self.members[0].name

    @property
    def dictionary_shape(self) -> tuple[int, int]:
        """Rows and row length of the stored dictionary: an atom, or on the side of the outputs an output, is a row."""
        if self.side == "output":
            return self.members[0].out_features, self.n_atoms
        return self.n_atoms, self.in_features

    def coefficients_shape(self, member: MemberSpec) -> tuple[int, int]:
        """Rows and columns of the matrix that the format stores: S, or S^T on the side of the outputs."""
        return (self.in_features, self.n_atoms) if self.side == "output" else (self.n_atoms, member.out_features)

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        members = [{f: getattr(m, f) for f in _MEMBER_TYPES} for m in self.members]
        return {f: getattr(self, f) for f in _GROUP_TYPES if f != "members"} | {"members": members}

    @classmethod
    def from_dict(cls, data: Any) -> "GroupSpec":
        """Check and read plain JSON values.

        Raises
        ------
        CheckpointError
            A key is missing or unknown, a value has the wrong type or sign, or the side is none.
        """
        _check(data, _GROUP_TYPES, "group")
        if not data["members"]:
            raise CheckpointError("a group without members")
        if data["side"] not in SIDES:
            raise CheckpointError(f"the description of a group has side={data['side']!r}, expected one of {SIDES}")
        for member in data["members"]:
            _check(member, _MEMBER_TYPES, "member")
        return cls(**{**data, "members": tuple(MemberSpec(**m) for m in data["members"])})


_GROUP_TYPES: dict[str, type] = {
    "in_features": int,
    "n_atoms": int,
    "members": list,
    "format": str,
    "value_dtype": str,
    "dictionary_dtype": str,
    "shared_input": bool,
    "side": str,
}
_MEMBER_TYPES: dict[str, type] = {"name": str, "out_features": int, "n_stored": int, "bias": bool}


def _check(data: Any, types: dict[str, type], what: str) -> None:
    if not isinstance(data, dict) or set(data) != set(types):
        keys = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise CheckpointError(f"the description of a {what} has {keys}, expected {sorted(types)}")
    for key, kind in types.items():
        value = data[key]
        if type(value) is not kind or (kind is int and not 0 <= int(data[key]) < 2**48):
            raise CheckpointError(f"the description of a {what} has {key}={value!r}, expected {kind.__name__}")
