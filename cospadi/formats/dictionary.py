"""How the dictionary of a group is stored; see docs/format.md, section 3."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.base import PackedDictionary
from cospadi.formats.bitstrings import check_strings, pack_strings, string_bytes, unpack_strings
from cospadi.formats.quantization import (
    GRIDS,
    check_quantized,
    check_scales,
    dequantize,
    grid_of,
    quantize,
    scale_shape,
)
from cospadi.formats.values import HOLDING_DTYPES, expect, require_no_scales, round_values

DICTIONARY_DTYPES = (
    "bfloat16",
    "float16",
    "float32",
    "int8",
    *(name for name, grid in GRIDS.items() if grid.group is not None),
    "none",
)
"""The dtypes that a dictionary can be stored in; ``none`` is the identity, which is not stored."""

_DEFAULTS = {"bfloat14": "bfloat16", "int6": "int8", "int4": "int8"}


def dictionary_dtype_of(value_dtype: str) -> str:
    """Give the dtype of the dictionary that belongs to a value dtype where no other is asked for.

    It is the same one, but ``bfloat16`` for ``bfloat14`` and ``int8`` for shorter whole numbers.
    """
    return _DEFAULTS.get(value_dtype, value_dtype)


def require_dictionary_dtype(dictionary_dtype: str) -> None:
    """Refuse what no dictionary is stored in.

    Raises
    ------
    UsageError
        It is not among ``DICTIONARY_DTYPES``.
    """
    if dictionary_dtype not in DICTIONARY_DTYPES:
        raise UsageError(f"{dictionary_dtype!r} is no dtype of a dictionary: choose {', '.join(DICTIONARY_DTYPES)}")


def dictionary_bits(n_atoms: int, in_features: int, dictionary_dtype: str) -> int:
    """Count the bits of a dictionary as it lands on disk, scales and the padding of rows included."""
    layout = dictionary_layout(n_atoms, in_features, dictionary_dtype)
    return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in layout.values())


def dictionary_layout(
    n_atoms: int, in_features: int, dictionary_dtype: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Give local name to (shape, dtype): ``dictionary`` and, for whole numbers, ``dictionary_scales``.

    Raises
    ------
    UsageError
        It is not among ``DICTIONARY_DTYPES``, or not square without being stored.
    """
    require_dictionary_dtype(dictionary_dtype)
    if dictionary_dtype == "none":
        if n_atoms != in_features:
            raise UsageError(f"a dictionary that is not stored is the identity, not {n_atoms} atoms of {in_features}")
        return {}
    grid = grid_of(dictionary_dtype)
    if grid is None:
        return {"dictionary": ((n_atoms, in_features), HOLDING_DTYPES[dictionary_dtype])}
    scales = (scale_shape(n_atoms, in_features, grid), grid.scale_dtype)
    if dictionary_dtype == "int8":
        return {"dictionary": ((n_atoms, in_features), torch.int8), "dictionary_scales": scales}
    row_bytes = string_bytes(in_features, grid.bits)
    return {"dictionary": ((n_atoms, row_bytes), torch.uint8), "dictionary_scales": scales}


def pack_dictionary(dictionary: Tensor, dictionary_dtype: str, scales: Tensor | None = None) -> PackedDictionary:
    """Store D, shape (in_features, n_atoms), rounding to nearest even.

    Parameters
    ----------
    dictionary : Tensor
        Not modified.
    dictionary_dtype : str
        One of ``DICTIONARY_DTYPES``.
    scales : Tensor, shape ``scale_shape(n_atoms, in_features, grid)``, optional
        For whole numbers; those of the largest magnitudes if not given.

    Raises
    ------
    UsageError
        It is none of them, scales are given to a floating dtype, or a dictionary that is not the identity is not to be
        stored.
    NumericalError
        A number overflows the dtype or is not finite, or a scale is not one that a file can hold.
    """
    require_dictionary_dtype(dictionary_dtype)
    atoms, grid = dictionary.detach().T.contiguous(), grid_of(dictionary_dtype)
    if dictionary_dtype == "none":
        require_no_scales(dictionary_dtype, scales)
        if atoms.shape[0] != atoms.shape[1] or not bool((atoms == torch.eye(len(atoms)).to(atoms)).all()):
            raise UsageError("dictionary dtype 'none' is for the identity: choose another one")
        return identity_dictionary(len(atoms))
    if grid is None:
        require_no_scales(dictionary_dtype, scales)
        return PackedDictionary(round_values(atoms, dictionary_dtype))
    values, scales = quantize(atoms, grid, scales)
    if dictionary_dtype == "int8":
        return PackedDictionary(values, scales)
    return PackedDictionary(pack_strings(values - grid.lowest, grid.bits), scales, grid, atoms.shape[1])


def identity_dictionary(size: int, device: torch.device | str | None = None) -> PackedDictionary:
    """Give the identity, which is not stored."""
    return PackedDictionary(torch.empty(size, 0, device=device), row_length=size)


def unpack_dictionary(packed: PackedDictionary) -> Tensor:
    """Give the atoms as rows, shape (n_atoms, in_features), in the stored dtype (float32 for whole numbers).

    Raises
    ------
    CheckpointError
        Padding bits of strings are set.
    """
    if packed.is_identity:
        return torch.eye(packed.in_features, device=packed.values.device)
    if packed.scales is None:
        return packed.values
    if packed.grid is None:
        return dequantize(packed.values, packed.scales, GRIDS["int8"])
    codes = unpack_strings("dictionary", packed.values, packed.in_features, packed.grid.bits)
    return dequantize(codes.to(torch.int8) + packed.grid.lowest, packed.scales, packed.grid)


def dictionary_tensors(packed: PackedDictionary) -> dict[str, Tensor]:
    """Give the tensors of a packed dictionary by local name."""
    if packed.is_identity:
        return {}
    scales = {} if packed.scales is None else {"dictionary_scales": packed.scales}
    return {"dictionary": packed.values} | scales


def held_dictionary(tensors: Mapping[str, Tensor], in_features: int, dictionary_dtype: str) -> PackedDictionary:
    """Gather a packed dictionary from tensors by local name, as ``dictionary_layout`` names them, unchecked."""
    if dictionary_dtype == "none":
        return identity_dictionary(in_features)
    values, scales, grid = tensors["dictionary"], tensors.get("dictionary_scales"), grid_of(dictionary_dtype)
    if grid is None or dictionary_dtype == "int8":
        return PackedDictionary(values, scales)
    return PackedDictionary(values, scales, grid, in_features)


def packed_dictionary(
    tensors: Mapping[str, Tensor], n_atoms: int, in_features: int, dictionary_dtype: str
) -> PackedDictionary:
    """Gather a packed dictionary from tensors by local name and check it.

    Raises
    ------
    CheckpointError
        A tensor is missing, has another shape or dtype, or holds what ``quantize`` never gives.
    """
    for name, (shape, dtype) in dictionary_layout(n_atoms, in_features, dictionary_dtype).items():
        if name not in tensors:
            raise CheckpointError(f"{name}: missing")
        expect(name, tensors[name], shape, dtype)
    packed = held_dictionary(tensors, in_features, dictionary_dtype)
    if packed.scales is not None:
        if packed.grid is None:
            check_quantized("dictionary", packed.values, GRIDS["int8"])
        else:
            check_strings("dictionary", packed.values, in_features, packed.grid.bits)
        check_scales("dictionary_scales", packed.scales, packed.grid or GRIDS["int8"])
    return packed
