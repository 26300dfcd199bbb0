"""Layers that are only quantised: the dictionary is the weight itself, and S, the identity, is not stored."""

from typing import ClassVar, final

import torch
from torch import Tensor

from cospadi.errors import UsageError
from cospadi.formats.base import Format, PackedCoefficients
from cospadi.formats.values import require_no_scales, require_value_dtype, tensors_of


@final
class Identity(Format):
    """No tensors at all; see docs/format.md, section 4.4.

    The atoms are the columns of W, so that a dictionary dtype says how the layer is quantised.  Values, of which there
    are none, have the dtype ``none``.
    """

    name: ClassVar[str] = "identity"
    value_dtypes: ClassVar[tuple[str, ...]] = ("none",)
    is_identity: ClassVar[bool] = True

    def bits(self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str) -> int:
        """Count none."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        return 0

    def count_stored(self, n_atoms: int, out_features: int, n_nonzero: int) -> int:
        """Count none."""
        return 0

    def layout(
        self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give nothing.

        Raises
        ------
        UsageError
            There are other than ``out_features`` atoms, or stored coefficients.
        """
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        if n_atoms != out_features or n_stored:
            raise UsageError(
                f"format 'identity' has an atom for each of the {out_features} outputs and stores no coefficients, "
                f"found {n_atoms} atoms and {n_stored} coefficients"
            )
        return {}

    def n_stored(self, packed: PackedCoefficients) -> int:
        """Count none."""
        return 0

    def pack(self, coefficients: Tensor, value_dtype: str, scales: Tensor | None = None) -> PackedCoefficients:
        """Store nothing, if S is the identity.

        Raises
        ------
        UsageError
            It is not, or another value dtype or scales are given.
        """
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        require_no_scales("the identity", scales)
        n_atoms, out_features = coefficients.shape
        ones = bool((coefficients.diagonal() == 1).all())
        if n_atoms != out_features or not ones or int(coefficients.count_nonzero()) != n_atoms:
            raise UsageError(
                f"format 'identity' takes the identity for coefficients, found another matrix of shape "
                f"{tuple(coefficients.shape)}: choose 'bitmask', 'csr' or 'dense'"
            )
        return PackedCoefficients(self.name, n_atoms, out_features, value_dtype, {})

    def check(self, packed: PackedCoefficients) -> None:
        """Check that there are no tensors."""
        tensors_of(packed)

    def unpack(self, packed: PackedCoefficients) -> Tensor:
        """Give the identity in float32; what multiplies should leave it out instead."""
        self.check(packed)
        return torch.eye(packed.n_atoms)

    def gather(self, packed: PackedCoefficients, matrix: Tensor) -> Tensor:
        """Take no entry."""
        return matrix.new_empty(0)
