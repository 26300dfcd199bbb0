"""Dense coefficients: for low-rank factorisations and for backends that want no indices."""

from typing import ClassVar, final

import torch
from torch import Tensor

from cospadi.formats.base import VALUE_BITS, Format, PackedCoefficients
from cospadi.formats.values import (
    decode_rows,
    encode_rows,
    read_values,
    require_value_dtype,
    scales_bits,
    scales_layout,
    store_values,
    stored_layout,
    tensors_of,
)


@final
class Dense(Format):
    """The transpose of S, (out_features, n_atoms); see docs/format.md, section 4.3."""

    name: ClassVar[str] = "dense"
    value_dtypes: ClassVar[tuple[str, ...]] = tuple(VALUE_BITS)

    def bits(self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str) -> int:
        """Count the bits of values and scales."""
        return VALUE_BITS[value_dtype] * n_stored + scales_bits(out_features, n_atoms, value_dtype)

    def count_stored(self, n_atoms: int, out_features: int, n_nonzero: int) -> int:
        """Count every entry, zero or not."""
        return n_atoms * out_features

    def layout(
        self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give ``values`` and, for whole numbers, ``scales``."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        values = stored_layout((out_features, n_atoms), value_dtype)
        return {"values": values, **scales_layout(out_features, n_atoms, value_dtype)}

    def n_stored(self, packed: PackedCoefficients) -> int:
        """Count every entry."""
        return packed.n_atoms * packed.out_features

    def pack(self, coefficients: Tensor, value_dtype: str, scales: Tensor | None = None) -> PackedCoefficients:
        """Round and transpose."""
        require_value_dtype(value_dtype, self.value_dtypes, self.name)
        n_atoms, out_features = coefficients.shape
        rows, besides = encode_rows(coefficients.T.contiguous(), value_dtype, scales)
        tensors = {"values": store_values(rows, value_dtype), **besides}
        return PackedCoefficients(self.name, n_atoms, out_features, value_dtype, tensors)

    def check(self, packed: PackedCoefficients) -> None:
        """Check shape and dtype, the padding of strings of bits and the scales."""
        self._read(packed)

    def unpack(self, packed: PackedCoefficients) -> Tensor:
        """Transpose back; a view of the stored tensor where it needs no decoding."""
        return decode_rows(self._read(packed), packed).T

    def gather(self, packed: PackedCoefficients, matrix: Tensor) -> Tensor:
        """Take every entry."""
        return matrix.T.contiguous()

    def _read(self, packed: PackedCoefficients) -> Tensor:
        (values,) = tensors_of(packed, "values")
        return read_values(values, (packed.out_features, packed.n_atoms), packed.value_dtype)
