"""Plain torch with dense coefficients: runs everywhere, in every floating dtype, and passes gradients to x.

All other backends are tested against it in float64.
"""

from typing import ClassVar, final

from torch import Tensor

from cospadi.backends.base import Backend, Placement
from cospadi.backends.dense_products import float_support, multiply, placed, unpacked
from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability


@final
class ReferenceBackend(Backend):
    """D and S as dense matrices in the dtype of x; holds S with its zeros."""

    name: ClassVar[str] = "reference"

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every device and every floating dtype."""
        return float_support(placement)

    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> Tensor:
        """Unpack S with its zeros."""
        return unpacked(packed, placement)

    def project(self, dictionary: Tensor, x: Tensor) -> Tensor:
        """Multiply by the dense dictionary."""
        return multiply(x, dictionary)

    def combine(self, coefficients: Tensor, z: Tensor) -> Tensor:
        """Multiply by the dense coefficients."""
        return multiply(z, coefficients)
