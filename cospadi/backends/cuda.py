"""NVIDIA GPUs through cuBLAS: S is unpacked once on the GPU and both products are dense.

This release has no fused kernel: the memory of a layer is that of D and of S with its zeros, and its time that of two
dense products.  It makes compressed models run on a GPU; it does not make them faster than dense ones as a rule.
"""

from typing import ClassVar, final

from torch import Tensor

from cospadi.arrays import cuda_availability
from cospadi.backends.base import Backend, Placement
from cospadi.backends.dense_products import float_support, multiply, placed, unpacked
from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability


@final
class CudaBackend(Backend):
    """Two cuBLAS products in the dtype of x."""

    name: ClassVar[str] = "cuda"

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether torch finds a CUDA GPU."""
        return cuda_availability()

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every floating dtype on a CUDA device."""
        if placement.device.type != "cuda":
            return Availability(False, f"the layer is on {placement.device}: move the model to a CUDA device")
        return float_support(placement)

    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> Tensor:
        """Unpack S with its zeros on the GPU."""
        return unpacked(packed, placement)

    def project(self, dictionary: Tensor, x: Tensor) -> Tensor:
        """Multiply by the dense dictionary."""
        return multiply(x, dictionary)

    def combine(self, coefficients: Tensor, z: Tensor) -> Tensor:
        """Multiply by the dense coefficients."""
        return multiply(z, coefficients)
