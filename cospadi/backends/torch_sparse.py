"""torch with compressed sparse rows where that is faster, and with dense coefficients elsewhere."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from cospadi.backends.base import Backend, Placement
from cospadi.backends.dense_products import DenseCoefficients, dense_coefficients, float_support, placed, projected
from cospadi.formats import PackedCoefficients, PackedDictionary
from cospadi.registry import Availability

SPARSE_DENSITY = 0.2
"""Largest density at which compressed rows are chosen; at the usual density of one half they read more bytes than S."""

_SPARSE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SparseRows:
    """S^T of each layer as compressed sparse rows."""

    layers: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class TorchBackend(Backend):
    """Compressed sparse rows in torch where S is sparse enough for them, dense coefficients elsewhere.

    Attributes
    ----------
    coefficients : {"auto", "sparse", "dense"}
        ``sparse``: compressed rows, which torch multiplies on a CPU in float32 and float64 only; ``dense``: S with its
        zeros; ``auto``: compressed rows where they work and the density is at most ``SPARSE_DENSITY``.
    """

    name: ClassVar[str] = "torch"

    coefficients: Literal["auto", "sparse", "dense"] = "auto"

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every floating dtype, unless compressed rows are demanded where torch has none."""
        if self.coefficients == "sparse" and not _sparse_works(placement):
            return Availability(
                False,
                f"torch multiplies compressed rows on a CPU in float32 and float64 only, not in {placement.dtype} on "
                f"{placement.device}: take coefficients='dense'",
            )
        return float_support(placement)

    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    def prepare_coefficients(
        self, members: Sequence[PackedCoefficients], placement: Placement
    ) -> DenseCoefficients | SparseRows:
        """Choose between compressed rows and dense coefficients."""
        dense = dense_coefficients(members, placement)
        if dense.rows is None or self.coefficients == "dense" or not _sparse_works(placement):
            return dense
        count = int((dense.rows != 0).sum())
        if self.coefficients == "auto" and count > SPARSE_DENSITY * dense.rows.numel():
            return dense
        starts = (0, *dense.ends)
        return SparseRows(tuple(_compressed(dense.rows[start:end]) for start, end in pairwise(starts)))

    def multiply(
        self, dictionary: Tensor | None, coefficients: DenseCoefficients | SparseRows, x: Tensor, member: int | None
    ) -> Tensor:
        """Multiply by the dense dictionary, if there is one, then by the coefficients as they were prepared."""
        z = projected(dictionary, x)
        if isinstance(coefficients, DenseCoefficients):
            return coefficients.multiply(z, member)
        layers = coefficients.layers if member is None else (coefficients.layers[member],)
        return torch.cat([layer @ z.T for layer in layers]).T.contiguous()


def _compressed(rows: Tensor) -> Tensor:
    """Give compressed sparse rows with 32-bit indices, which are read faster than 64-bit ones."""
    with warnings.catch_warnings():
        # torch announces once that sparse CSR is in beta; the layout used here has been stable since 1.13.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        sparse = rows.to_sparse_csr()
        index = torch.int32 if sparse.values().numel() < 2**31 else torch.int64
        pointers, columns = sparse.crow_indices().to(index), sparse.col_indices().to(index)
        return torch.sparse_csr_tensor(pointers, columns, sparse.values(), rows.shape, check_invariants=False)


def _sparse_works(placement: Placement) -> bool:
    return placement.device.type == "cpu" and placement.dtype in _SPARSE_DTYPES
