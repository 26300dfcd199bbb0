"""torch with compressed sparse rows where that is faster, and with dense coefficients elsewhere."""

import warnings
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from cospadi.backends.base import Backend, Placement
from cospadi.backends.dense_products import float_support, multiply, placed, unpacked
from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability

SPARSE_DENSITY = 0.2
"""Largest density at which compressed rows are chosen; at the usual density of one half they read more bytes than S."""

_SPARSE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SparseRows:
    """S^T as compressed sparse rows, held as plain tensors since torch.compile refuses sparse ones."""

    pointers: Tensor
    columns: Tensor
    values: Tensor
    n_atoms: int


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

    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> Tensor | SparseRows:
        """Choose between compressed rows and dense coefficients."""
        rows = unpacked(packed, placement)
        if self.coefficients == "dense" or not _sparse_works(placement):
            return rows
        count = int((rows != 0).sum())
        if self.coefficients == "auto" and count > SPARSE_DENSITY * rows.numel():
            return rows
        with warnings.catch_warnings():
            # torch announces once that sparse CSR is in beta; the layout used here has been stable since 1.13.
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
            sparse = rows.to_sparse_csr()
        # 32-bit indices are read faster than 64-bit ones.
        index = torch.int32 if count < 2**31 else torch.int64
        # Copies, since views of a sparse tensor would drag it into torch.compile.
        return SparseRows(
            sparse.crow_indices().to(index, copy=True),
            sparse.col_indices().to(index, copy=True),
            sparse.values().clone(),
            packed.n_atoms,
        )

    def project(self, dictionary: Tensor, x: Tensor) -> Tensor:
        """Multiply by the dense dictionary."""
        return multiply(x, dictionary)

    def combine(self, coefficients: Tensor | SparseRows, z: Tensor) -> Tensor:
        """Multiply by the coefficients as they were prepared."""
        if isinstance(coefficients, Tensor):
            return multiply(z, coefficients)
        c = coefficients
        flat = z.reshape(-1, z.shape[-1])
        y = torch.ops.cospadi.multiply_rows(c.pointers, c.columns, c.values, flat)
        return y.reshape(*z.shape[:-1], y.shape[-1])


def _sparse_works(placement: Placement) -> bool:
    return placement.device.type == "cpu" and placement.dtype in _SPARSE_DTYPES


@torch.library.custom_op("cospadi::multiply_rows", mutates_args=())
def multiply_rows(pointers: Tensor, columns: Tensor, values: Tensor, z: Tensor) -> Tensor:
    """Give z S, shape (n_tokens, out_features), from the compressed rows of S^T and z, shape (n_tokens, n_atoms)."""
    rows = torch.sparse_csr_tensor(
        pointers, columns, values, (pointers.numel() - 1, z.shape[1]), check_invariants=False
    )
    return (rows @ z.T).T.contiguous()


@multiply_rows.register_fake
def _(pointers: Tensor, columns: Tensor, values: Tensor, z: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], pointers.numel() - 1)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.n_atoms = inputs[3].shape[1]  # type: ignore[attr-defined]


def _gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[None, None, None, Tensor]:
    pointers, columns, values = ctx.saved_tensors  # type: ignore[attr-defined]
    size = (ctx.n_atoms, pointers.numel() - 1)  # type: ignore[attr-defined]
    # The compressed rows of S^T are the compressed columns of S.
    coefficients = torch.sparse_csc_tensor(pointers, columns, values, size, check_invariants=False)
    return None, None, None, (coefficients @ gradient.T).T


multiply_rows.register_autograd(_gradient, setup_context=_save)
