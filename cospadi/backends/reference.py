"""Plain torch with dense coefficients: runs everywhere, in every floating dtype, and passes gradients to x.

All other backends are tested against it in float64.
"""

from typing import ClassVar, final

from cospadi.backends.base import Placement
from cospadi.backends.dense_products import DenseProducts, float_support
from cospadi.formats import PackedCoefficients
from cospadi.registry import Availability


@final
class ReferenceBackend(DenseProducts):
    """D and S as dense matrices in the dtype of x; holds S with its zeros."""

    name: ClassVar[str] = "reference"

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every device and every floating dtype."""
        return float_support(placement)
