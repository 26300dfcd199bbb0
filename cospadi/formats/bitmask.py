"""The default format: one bit per entry of S says whether it is stored, then the stored values alone."""

from typing import ClassVar, final

import torch
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.formats.base import VALUE_BITS, Format, PackedCoefficients
from cospadi.formats.bitstrings import check_strings, pack_strings, string_bytes
from cospadi.formats.values import (
    decode_rows,
    encode_rows,
    expect,
    read_values,
    require_value_dtype,
    scales_bits,
    scales_layout,
    store_values,
    stored_layout,
    tensors_of,
)


@final
class Bitmask(Format):
    """Values column by column and a packed bit mask; see docs/format.md, section 4.1."""

    name: ClassVar[str] = "bitmask"
    value_dtypes: ClassVar[tuple[str, ...]] = tuple(VALUE_BITS)

    def bits(self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str) -> int:
        """Count the bits of values, mask and scales; the mask's rows are whole bytes."""
        mask_bits = 8 * out_features * string_bytes(n_atoms, 1)
        return VALUE_BITS[value_dtype] * n_stored + mask_bits + scales_bits(out_features, n_atoms, value_dtype)

    def count_stored(self, n_atoms: int, out_features: int, n_nonzero: int) -> int:
        """Count the non-zeros."""
        return n_nonzero * out_features

    def layout(
        self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give ``values``, ``mask`` and, for whole numbers, ``scales``."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        return {
            "values": stored_layout((n_stored,), value_dtype),
            "mask": ((out_features, string_bytes(n_atoms, 1)), torch.uint8),
            **scales_layout(out_features, n_atoms, value_dtype),
        }

    def n_stored(self, packed: PackedCoefficients) -> int:
        """Count the bits of the mask, since the length of a string of bits leaves the count open."""
        return int(count_bits(packed.tensors["mask"]).sum())

    def pack(self, coefficients: Tensor, value_dtype: str, scales: Tensor | None = None) -> PackedCoefficients:
        """Round, drop what is zero and pack the support."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        n_atoms, out_features = coefficients.shape
        rows, besides = encode_rows(coefficients.T.contiguous(), value_dtype, scales)
        support = rows != 0
        tensors = {"values": store_values(rows[support], value_dtype), "mask": pack_bits(support), **besides}
        return PackedCoefficients(self.name, n_atoms, out_features, value_dtype, tensors)

    def check(self, packed: PackedCoefficients) -> None:
        """Check shapes, the population of the mask, the padding and the scales."""
        self._read(packed)

    def unpack(self, packed: PackedCoefficients) -> Tensor:
        """Scatter the values to the places that the mask names."""
        values = self._read(packed)
        support = unpack_bits(packed.tensors["mask"], packed.n_atoms)
        rows = values.new_zeros(packed.out_features, packed.n_atoms)
        return decode_rows(rows.masked_scatter_(support, values), packed).T

    def gather(self, packed: PackedCoefficients, matrix: Tensor) -> Tensor:
        """Select by the mask, column by column."""
        return matrix.T[unpack_bits(packed.tensors["mask"], packed.n_atoms)]

    def _read(self, packed: PackedCoefficients) -> Tensor:
        stored, mask = tensors_of(packed, "values", "mask")
        expect("mask", mask, (packed.out_features, string_bytes(packed.n_atoms, 1)), torch.uint8)
        check_strings("mask", mask, packed.n_atoms, 1)
        count = self.n_stored(packed)
        try:
            return read_values(stored, (count,), packed.value_dtype)
        except CheckpointError as error:
            raise CheckpointError(f"{error} (the mask has {count} bits set)") from error


def pack_bits(support: Tensor) -> Tensor:
    """Pack booleans, shape (rows, n), into bytes, shape (rows, ceil(n / 8)), the lowest bit first."""
    return pack_strings(support, 1)


def unpack_bits(mask: Tensor, n: int) -> Tensor:
    """Give the first ``n`` bits of every row as booleans, shape (rows, n)."""
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts).bitwise_and_(1)
    return bits.reshape(mask.shape[0], mask.shape[1] * 8)[:, :n].bool()


def count_bits(mask: Tensor) -> Tensor:
    """Count the bits set in every row of bytes: int64, shape (rows,)."""
    # Sums of neighbouring bits, pairs and fours in parallel: no table, so it runs on every device.
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dim=1, dtype=torch.int64)
