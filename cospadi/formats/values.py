"""How coefficients are stored: rounding to a value dtype, and values of few bits as strings of bits.

Whole numbers have a tensor ``scales`` beside the values, one for each column of S.
"""

import math

import torch
from torch import Tensor

from cospadi.errors import CheckpointError, NumericalError, UsageError
from cospadi.formats.base import VALUE_BITS, PackedCoefficients
from cospadi.formats.bitstrings import pack_strings, string_bytes, unpack_strings
from cospadi.formats.quantization import check_quantized, check_scales, dequantize, grid_of, quantize, scale_shape

HOLDING_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat14": torch.bfloat16,
    "int8": torch.int8,
    "int6": torch.int8,
    "int4": torch.int8,
}
"""The torch dtype that holds a value of each value dtype exactly; for whole numbers without their scale."""

_STRINGS = ("bfloat14", "int6", "int4")
"""Value dtypes that no tensor dtype has: strings of bits."""

_EXPONENT = 0x1FE0
_DROPPED = 18  # bits of a float32 mantissa that bfloat14 lacks


def require_value_dtype(value_dtype: str, offered: tuple[str, ...], format_name: str) -> None:
    """Refuse a value dtype that a format does not offer.

    Raises
    ------
    UsageError
        It is not among ``offered``.
    """
    if value_dtype not in offered:
        raise UsageError(
            f"format {format_name!r} does not store {value_dtype!r} values (it stores {', '.join(offered)})"
        )


def round_values(values: Tensor, value_dtype: str) -> Tensor:
    """Round to nearest even in a floating value dtype.

    Parameters
    ----------
    values : Tensor, any shape, floating
        float64 passes through float32.
    value_dtype : str
        A floating key of ``VALUE_BITS``.

    Returns
    -------
    Tensor, same shape
        In the holding dtype: bfloat16 for ``bfloat14``.

    Raises
    ------
    NumericalError
        A value is not finite, or rounding takes it to infinity.
    """
    if value_dtype == "bfloat14":
        bits = values.to(torch.float32).view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        # Adding just under half of the last kept bit, and that bit itself, rounds to nearest with ties to even.
        tie = (magnitude >> _DROPPED) & 1
        magnitude = (magnitude + ((1 << (_DROPPED - 1)) - 1) + tie) >> _DROPPED << _DROPPED
        # Above the pattern of infinity lie the NaNs; a NaN may even carry into the sign, so it is looked for before.
        finite = bool(torch.isfinite(values).all())
        rounded = (magnitude | (bits & -0x80000000)).view(torch.float32).to(torch.bfloat16)
    else:
        finite = bool(torch.isfinite(values).all())
        rounded = values.to(torch.float32).to(HOLDING_DTYPES[value_dtype])
    if not finite:
        raise NumericalError("values hold NaN or infinity")
    if not bool(torch.isfinite(rounded).all()):
        raise NumericalError(
            f"a value of magnitude {float(values.abs().max()):g} overflows {value_dtype}: choose bfloat16 or float32"
        )
    return rounded


def require_no_scales(dtype: str, scales: Tensor | None) -> None:
    """Refuse scales for a floating dtype.

    Raises
    ------
    UsageError
        There are some.
    """
    if scales is not None:
        raise UsageError(f"{dtype} has no scales: store the dtype that they were made for, or leave them out")


def encode_rows(rows: Tensor, value_dtype: str, scales: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Round S^T, shape (out_features, n_atoms), for storage.

    Parameters
    ----------
    rows : Tensor
    value_dtype : str
    scales : Tensor, shape (out_features,), optional
        For whole numbers; those of the largest magnitudes if not given.

    Returns
    -------
    Tensor, same shape
        In the holding dtype.
    dict of str to Tensor
        What is stored besides: ``scales`` for whole numbers, else nothing.

    Raises
    ------
    NumericalError
        A value overflows the dtype or is not finite, or a scale is not one that a file can hold.
    UsageError
        Scales are given to a floating dtype.
    """
    grid = grid_of(value_dtype)
    if grid is None:
        require_no_scales(value_dtype, scales)
        return round_values(rows, value_dtype), {}
    values, scales = quantize(rows, grid, scales)
    return values, {"scales": scales}


def decode_rows(rows: Tensor, packed: PackedCoefficients) -> Tensor:
    """Give S^T from S^T in the holding dtype: for whole numbers times the scales, in float32."""
    grid = grid_of(packed.value_dtype)
    return rows if grid is None else dequantize(rows, packed.tensors["scales"], grid)


def scales_layout(out_features: int, n_atoms: int, value_dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Give ``scales`` with shape and dtype for whole numbers, else nothing."""
    grid = grid_of(value_dtype)
    return {} if grid is None else {"scales": (scale_shape(out_features, n_atoms, grid), grid.scale_dtype)}


def scales_bits(out_features: int, n_atoms: int, value_dtype: str) -> int:
    """Count the bits of the scales."""
    layout = scales_layout(out_features, n_atoms, value_dtype)
    return sum(8 * dtype.itemsize * math.prod(shape) for shape, dtype in layout.values())


def stored_layout(shape: tuple[int, ...], value_dtype: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Give shape and dtype of the tensor that stores values of a shape."""
    if value_dtype not in _STRINGS:
        return shape, HOLDING_DTYPES[value_dtype]
    return (string_bytes(math.prod(shape), VALUE_BITS[value_dtype]),), torch.uint8


def store_values(values: Tensor, value_dtype: str) -> Tensor:
    """Give the stored tensor of values that are already rounded (in the holding dtype)."""
    if value_dtype not in _STRINGS:
        return values.contiguous()
    values, grid = values.reshape(1, -1), grid_of(value_dtype)
    codes = (values.view(torch.int16).to(torch.int32) & 0xFFFF) >> 2 if grid is None else values - grid.lowest
    return pack_strings(codes, VALUE_BITS[value_dtype])[0]


def read_values(stored: Tensor, shape: tuple[int, ...], value_dtype: str) -> Tensor:
    """Give the values of a stored tensor, in the holding dtype.

    Raises
    ------
    CheckpointError
        The tensor has the wrong shape or dtype for values of this shape, a string of bits has bits set beyond its end,
        14-bit values are not finite, or an 8-bit value is -128.
    """
    expect("values", stored, *stored_layout(shape, value_dtype))
    grid = grid_of(value_dtype)
    if value_dtype not in _STRINGS:
        if grid is not None:
            check_quantized("values", stored, grid)
        return stored
    codes = unpack_strings("values", stored[None], math.prod(shape), VALUE_BITS[value_dtype]).reshape(shape)
    if grid is not None:
        return codes.to(torch.int8) + grid.lowest
    if bool((codes & _EXPONENT == _EXPONENT).any()):
        raise CheckpointError("values: NaN or infinity")
    return (codes << 2).to(torch.int16).view(torch.bfloat16)


def tensors_of(packed: PackedCoefficients, *names: str) -> list[Tensor]:
    """Give the tensors of these local names, which must be all there are but for the scales, which are checked.

    Raises
    ------
    CheckpointError
        One is missing or unknown, or the scales are not such as ``check_scales`` accepts.
    """
    layout, grid = scales_layout(packed.out_features, packed.n_atoms, packed.value_dtype), grid_of(packed.value_dtype)
    expected = {*names, *layout}
    if set(packed.tensors) != expected:
        raise CheckpointError(f"found tensors {sorted(packed.tensors)}, expected {sorted(expected)}")
    if grid is not None:
        expect("scales", packed.tensors["scales"], *layout["scales"])
        check_scales("scales", packed.tensors["scales"], grid)
    return [packed.tensors[name] for name in names]


def expect(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse a tensor that has another shape or dtype.

    Raises
    ------
    CheckpointError
        With what was found and what belongs there.
    """
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
        found = f"{tuple(tensor.shape)} {tensor.dtype}"
        raise CheckpointError(f"{name}: found {found}, expected {tuple(shape)} {dtype}".replace("torch.", ""))
