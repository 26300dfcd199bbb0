"""How the dictionary of a group is stored; see docs/format.md, section 3."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.formats.base import VALUE_BITS, PackedDictionary
from cospadi.formats.quantization import SCALE_BITS, check_quantized, check_scales, dequantize_rows, quantize_rows
from cospadi.formats.values import HOLDING_DTYPES, expect, round_values


def dictionary_dtype_of(value_dtype: str) -> str:
    """Give the dtype of the dictionary beside coefficients of a value dtype: 14 bits are for coefficients only."""
    return "bfloat16" if value_dtype == "bfloat14" else value_dtype


def dictionary_bits(n_atoms: int, in_features: int, dictionary_dtype: str) -> int:
    """Count the bits of a dictionary as it lands on disk, scales included."""
    scale_bits = SCALE_BITS if dictionary_dtype == "int8" else 0
    return (VALUE_BITS[dictionary_dtype] * in_features + scale_bits) * n_atoms


def dictionary_layout(
    n_atoms: int, in_features: int, dictionary_dtype: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Give local name to (shape, dtype): ``dictionary`` and, for int8, ``dictionary_scales``."""
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "dictionary": ((n_atoms, in_features), HOLDING_DTYPES[dictionary_dtype])
    }
    if dictionary_dtype == "int8":
        layout["dictionary_scales"] = ((n_atoms,), torch.float32)
    return layout


def pack_dictionary(dictionary: Tensor, dictionary_dtype: str) -> PackedDictionary:
    """Store D, shape (in_features, n_atoms), rounding to nearest even; int8 has one scale per atom.

    Raises
    ------
    NumericalError
        A number overflows the dtype or is not finite.
    """
    atoms = dictionary.detach().T.contiguous()
    if dictionary_dtype == "int8":
        return PackedDictionary(*quantize_rows(atoms))
    return PackedDictionary(round_values(atoms, dictionary_dtype))


def unpack_dictionary(packed: PackedDictionary) -> Tensor:
    """Give the atoms as rows, shape (n_atoms, in_features), in the stored dtype (float32 for int8)."""
    return packed.values if packed.scales is None else dequantize_rows(packed.values, packed.scales)


def dictionary_tensors(packed: PackedDictionary) -> dict[str, Tensor]:
    """Give the tensors of a packed dictionary by local name."""
    scales = {} if packed.scales is None else {"dictionary_scales": packed.scales}
    return {"dictionary": packed.values} | scales


def packed_dictionary(
    tensors: Mapping[str, Tensor], n_atoms: int, in_features: int, dictionary_dtype: str
) -> PackedDictionary:
    """Gather a packed dictionary from tensors by local name and check it.

    Raises
    ------
    CheckpointError
        A tensor is missing, has another shape or dtype, or holds what ``quantize_rows`` never gives.
    """
    for name, (shape, dtype) in dictionary_layout(n_atoms, in_features, dictionary_dtype).items():
        if name not in tensors:
            raise CheckpointError(f"{name}: missing")
        expect(name, tensors[name], shape, dtype)
    packed = PackedDictionary(tensors["dictionary"], tensors.get("dictionary_scales"))
    if packed.scales is not None:
        check_quantized("dictionary", packed.values)
        check_scales("dictionary_scales", packed.scales)
    return packed
