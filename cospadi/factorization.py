"""The values that pass between the stages: a factorised group of layers and its description.

Throughout, ``W`` is (in_features, out_features), the transpose of ``torch.nn.Linear.weight``; the dictionary ``D`` is
(in_features, n_atoms) with atoms as columns; the coefficients ``S`` are (n_atoms, out_features), sparse by column.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import CheckpointError


@dataclass(frozen=True)
class SparseFactorization:
    """One dictionary and the coefficients of each layer that shares it.

    Attributes
    ----------
    dictionary : Tensor, shape (in_features, n_atoms), floating
        Atoms are columns, in the space of the layer's inputs (not whitened).
    coefficients : dict of str to Tensor, shape (n_atoms, out_features of the member), floating
        By the member layer's name, in the order of the model.  Zeros outside the support.
    """

    dictionary: Tensor
    coefficients: dict[str, Tensor]

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

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.dictionary.shape[0]

    @property
    def n_atoms(self) -> int:
        """Number of atoms (columns) of the dictionary."""
        return self.dictionary.shape[1]

    def to_dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiply out one member: D S, shape (in_features, out_features)."""
        return self.dictionary.to(dtype) @ self.coefficients[name].to(dtype)


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
        Coefficients stored (for ``bitmask`` and ``csr`` the non-zeros, for ``dense`` all).
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
        Shape of the dictionary.
    members : tuple of MemberSpec
        The layers; the first one owns the dictionary's tensor in the checkpoint.
    format : str
        Name of the coefficients' format.
    value_dtype : str
        ``bfloat16``, ``float16``, ``float32``, ``bfloat14`` or ``int8``, of the coefficients.
    dictionary_dtype : str
        ``bfloat16``, ``float16``, ``float32`` or ``int8``.
    shared_input : bool
        Whether the members receive the very same input tensor, so that x D is computed once for all.
    """

    in_features: int
    n_atoms: int
    members: tuple[MemberSpec, ...]
    format: str
    value_dtype: str
    dictionary_dtype: str
    shared_input: bool

    @property
    def name(self) -> str:
        """The name of the first member, which names the group."""
        return self.members[0].name

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
            A key is missing or unknown, or a value has the wrong type or sign.
        """
        _check(data, _GROUP_TYPES, "group")
        if not data["members"]:
            raise CheckpointError("a group without members")
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
