"""Compressed sparse rows of the transpose of S: for sparse libraries and for densities far below one half."""

from typing import ClassVar, final

import torch
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.formats.base import VALUE_BITS, Format, PackedCoefficients
from cospadi.formats.values import (
    HOLDING_DTYPES,
    decode_rows,
    encode_rows,
    expect,
    read_values,
    require_value_dtype,
    scales_bits,
    scales_layout,
    tensors_of,
)


@final
class CSR(Format):
    """Values, atoms and row pointers of S^T; see docs/format.md, section 4.2."""

    name: ClassVar[str] = "csr"
    value_dtypes: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32", "int8")

    def bits(self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str) -> int:
        """Count the bits of values, atoms, row pointers and scales."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        index_bits, pointer_bits = 8 * _index_dtype(n_atoms).itemsize, 8 * _pointer_dtype(n_stored).itemsize
        list_bits = (VALUE_BITS[value_dtype] + index_bits) * n_stored
        return list_bits + pointer_bits * (out_features + 1) + scales_bits(out_features, n_atoms, value_dtype)

    def count_stored(self, n_atoms: int, out_features: int, n_nonzero: int) -> int:
        """Count the non-zeros."""
        return n_nonzero * out_features

    def layout(
        self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give ``values``, ``columns``, ``row_pointers`` and, for ``int8``, ``scales``."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        return {
            "values": ((n_stored,), HOLDING_DTYPES[value_dtype]),
            "columns": ((n_stored,), _index_dtype(n_atoms)),
            "row_pointers": ((out_features + 1,), _pointer_dtype(n_stored)),
            **scales_layout(out_features, n_atoms, value_dtype),
        }

    def n_stored(self, packed: PackedCoefficients) -> int:
        """Count the values."""
        return packed.tensors["values"].numel()

    def pack(self, coefficients: Tensor, value_dtype: str, scales: Tensor | None = None) -> PackedCoefficients:
        """Round, drop what is zero and list the rest."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        n_atoms, out_features = coefficients.shape
        rows, besides = encode_rows(coefficients.T.contiguous(), value_dtype, scales)
        support = rows != 0
        values = rows[support]
        pointers = torch.zeros(out_features + 1, dtype=_pointer_dtype(values.numel()), device=rows.device)
        pointers[1:] = support.sum(dim=1).cumsum(0)
        columns = support.nonzero()[:, 1].to(_index_dtype(n_atoms))
        tensors = {"values": values, "columns": columns, "row_pointers": pointers, **besides}
        return PackedCoefficients(self.name, n_atoms, out_features, value_dtype, tensors)

    def check(self, packed: PackedCoefficients) -> None:
        """Check shapes, pointers, the order of the atoms and the scales."""
        self._read(packed)

    def unpack(self, packed: PackedCoefficients) -> Tensor:
        """Scatter the values to their rows and atoms."""
        row_of = self._read(packed)
        rows = packed.tensors["values"].new_zeros(packed.out_features, packed.n_atoms)
        rows[row_of, packed.tensors["columns"].long()] = packed.tensors["values"]
        return decode_rows(rows, packed).T

    def gather(self, packed: PackedCoefficients, matrix: Tensor) -> Tensor:
        """Select by row and atom."""
        return matrix.T[self._read(packed), packed.tensors["columns"].long()]

    def _read(self, packed: PackedCoefficients) -> Tensor:
        """Check the tensors and give the row of every value."""
        values, columns, pointers = tensors_of(packed, "values", "columns", "row_pointers")
        layout = self.layout(packed.n_atoms, packed.out_features, values.numel(), packed.value_dtype)
        for name, (shape, dtype) in layout.items():
            expect(name, packed.tensors[name], shape, dtype)
        read_values(values, tuple(values.shape), packed.value_dtype)
        pointers, columns = pointers.long(), columns.long()
        counts = pointers.diff()
        if int(pointers[0]) != 0 or int(pointers[-1]) != columns.numel() or bool((counts < 0).any()):
            raise CheckpointError("row_pointers: not ascending from 0 to the number of values")
        row_of = torch.repeat_interleave(counts)
        if bool(((columns < 0) | (columns >= packed.n_atoms)).any()):
            raise CheckpointError(f"columns: an atom is out of range (there are {packed.n_atoms})")
        if bool(((columns.diff() <= 0) & (row_of.diff() == 0)).any()):
            raise CheckpointError("columns: atoms are not ascending within a row")
        return row_of


def _index_dtype(n_atoms: int) -> torch.dtype:
    return torch.int16 if n_atoms <= 32767 else torch.int32


def _pointer_dtype(n_stored: int) -> torch.dtype:
    return torch.int32 if n_stored < 2**31 else torch.int64
