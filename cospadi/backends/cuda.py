"""NVIDIA GPUs through cuBLAS: S is unpacked once on the GPU and both products are dense.

This release has no fused kernel: the memory of a layer is that of D and of S with its zeros, and its time that of two
dense products.  It makes compressed models run on a GPU; it does not make them faster than dense ones as a rule.
"""

from typing import ClassVar, final

from cospadi.arrays import cuda_availability
from cospadi.backends.base import Placement
from cospadi.backends.dense_products import DenseProducts, gpu_support
from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability


@final
class CudaBackend(DenseProducts):
    """Two cuBLAS products in the dtype of x."""

    name: ClassVar[str] = "cuda"

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether torch finds a CUDA GPU."""
        return cuda_availability()

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every floating dtype on a CUDA device."""
        return gpu_support(placement)
