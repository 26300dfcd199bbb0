"""cupy's compressed sparse rows on an NVIDIA GPU: an independent check of the other backends, not a fast path.

cupy has no bfloat16 or float16 sparse matrices, so values are float32 (float64 for float64 inputs) with 32-bit indices:
at the usual density of one half that is twice the bytes of a dense bfloat16 S.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from cospadi.arrays import cupy_availability
from cospadi.backends.base import Backend, Placement
from cospadi.backends.dense_products import gpu_support, is_identity, placed, projected, unpacked
from cospadi.formats import PackedCoefficients, PackedDictionary
from cospadi.registry import Availability


@final
class CupyBackend(Backend):
    """x D by torch, z S by cupy, exchanged without copies through DLPack; cupy takes memory from its own pool."""

    name: ClassVar[str] = "cupy"

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether cupy is installed and finds a GPU."""
        return cupy_availability()

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every floating dtype on a CUDA device."""
        return gpu_support(placement)

    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    def prepare_coefficients(self, members: Sequence[PackedCoefficients], placement: Placement) -> list[Any]:
        """Make S^T of each layer a cupy CSR matrix; there is none where S is the identity."""
        if is_identity(members):
            return []
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        matrices = []
        for packed in members:
            rows = unpacked(packed, Placement(placement.device, _exact(placement.dtype)))
            with _on_stream_of(rows):
                matrices.append(csr_matrix(cupy.from_dlpack(rows)))
        return matrices

    def multiply(self, dictionary: Tensor | None, coefficients: list[Any], x: Tensor, member: int | None) -> Tensor:
        """Multiply by the dictionary, if there is one, then by the coefficients, in float32 for the 16-bit dtypes."""
        z = projected(dictionary, x)
        if not coefficients:
            return z
        z = z.to(_exact(x.dtype))
        matrices = coefficients if member is None else [coefficients[member]]
        return torch.cat([_product(matrix, z) for matrix in matrices], dim=1).to(x.dtype)


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(matrix: Any, z: Tensor) -> Tensor:
    """Give (matrix z^T)^T; z^T is column-major, which is what cuSPARSE reads, so nothing is copied on the way in."""
    import cupy

    with _on_stream_of(z):
        return from_dlpack((matrix @ cupy.from_dlpack(z).T).T)


def _on_stream_of(tensor: Tensor) -> Any:
    """Let cupy queue its work on torch's stream, so that neither waits for the other."""
    import cupy

    stream = torch.cuda.current_stream(tensor.device)
    return cupy.cuda.ExternalStream(stream.cuda_stream, tensor.device.index)
