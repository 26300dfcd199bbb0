"""cupy's compressed sparse rows on an NVIDIA GPU: an independent check of the other backends, not a fast path.

cupy has no bfloat16 or float16 sparse matrices, so values are float32 (float64 for float64 inputs) with 32-bit indices:
at the usual density of one half that is twice the bytes of a dense bfloat16 S.
"""

from typing import Any, ClassVar, final

import torch
from torch import Tensor

from cospadi.arrays import cupy_availability
from cospadi.backends.base import Backend, Placement
from cospadi.backends.dense_products import gpu_support, multiply, placed, unpacked
from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability


@final
class CupyBackend(Backend):
    """x D by torch, z S by cupy, exchanged without copies through DLPack."""

    name: ClassVar[str] = "cupy"

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether cupy is installed and finds a GPU."""
        return cupy_availability()

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every floating dtype on a CUDA device."""
        return gpu_support(placement)

    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> Any:
        """Make S^T a cupy CSR matrix."""
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        dtype = torch.float64 if placement.dtype == torch.float64 else torch.float32
        rows = unpacked(packed, Placement(placement.device, dtype))
        with _on_stream_of(rows):
            return csr_matrix(cupy.from_dlpack(rows))

    def project(self, dictionary: Tensor, x: Tensor) -> Tensor:
        """Multiply by the dense dictionary."""
        return multiply(x, dictionary)

    def combine(self, coefficients: Any, z: Tensor) -> Tensor:
        """Multiply by the sparse coefficients, in float32 for the 16-bit dtypes."""
        flat = z.reshape(-1, z.shape[-1])
        exact = flat.to(torch.float64 if z.dtype == torch.float64 else torch.float32).contiguous()
        y = _Multiply.apply(exact, coefficients)
        return y.to(z.dtype).reshape(*z.shape[:-1], y.shape[-1])


class _Multiply(torch.autograd.Function):
    """z S with S^T in compressed rows; the gradient is that of z alone."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, rows: Any) -> Tensor:
        ctx.rows = rows
        return _product(rows, z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _product(ctx.rows.T, gradient.contiguous()), None


def _product(matrix: Any, z: Tensor) -> Tensor:
    """Give (matrix z^T)^T; z^T is column-major, which is what cuSPARSE reads, so nothing is copied on the way in."""
    import cupy

    if z.shape[0] == 0:
        return z.new_zeros(0, matrix.shape[0])
    with _on_stream_of(z):
        return torch.from_dlpack((matrix @ cupy.from_dlpack(z.detach()).T).T).contiguous()


def _on_stream_of(tensor: Tensor) -> Any:
    """Let cupy queue its work on torch's stream, so that neither waits for the other."""
    import cupy

    stream = torch.cuda.current_stream(tensor.device)
    return cupy.cuda.ExternalStream(stream.cuda_stream, tensor.device.index)
