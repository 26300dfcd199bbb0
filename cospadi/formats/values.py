"""How coefficients are stored: rounding to a value dtype.

``bfloat14`` has four values in seven bytes, ``int8`` a tensor ``scales`` beside the values.
"""

import torch
from torch import Tensor

from cospadi.errors import CheckpointError, NumericalError, UsageError
from cospadi.formats.base import VALUE_BITS, PackedCoefficients
from cospadi.formats.quantization import SCALE_BITS, check_quantized, check_scales, dequantize_rows, quantize_rows

HOLDING_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "bfloat14": torch.bfloat16,
    "int8": torch.int8,
}
"""The torch dtype that holds a value of each value dtype exactly; for ``int8`` without its scale."""

_CODE = (1 << 14) - 1
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
        A key of ``VALUE_BITS``, not ``int8``.

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


def encode_rows(rows: Tensor, value_dtype: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Round S^T, shape (out_features, n_atoms), for storage.

    Returns
    -------
    Tensor, same shape
        In the holding dtype.
    dict of str to Tensor
        What is stored besides: ``scales`` for ``int8``, else nothing.

    Raises
    ------
    NumericalError
        A value overflows the dtype or is not finite.
    """
    if value_dtype != "int8":
        return round_values(rows, value_dtype), {}
    values, scales = quantize_rows(rows)
    return values, {"scales": scales}


def decode_rows(rows: Tensor, packed: PackedCoefficients) -> Tensor:
    """Give S^T from S^T in the holding dtype: for ``int8`` times the scales, in float32."""
    return dequantize_rows(rows, packed.tensors["scales"]) if packed.value_dtype == "int8" else rows


def scales_layout(out_features: int, value_dtype: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Give ``scales`` with shape and dtype for ``int8``, else nothing."""
    return {"scales": ((out_features,), torch.float32)} if value_dtype == "int8" else {}


def scales_bits(out_features: int, value_dtype: str) -> int:
    """Count the bits of the scales."""
    return SCALE_BITS * out_features if value_dtype == "int8" else 0


def stored_layout(shape: tuple[int, ...], value_dtype: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Give shape and dtype of the tensor that stores values of a shape."""
    if value_dtype != "bfloat14":
        return shape, HOLDING_DTYPES[value_dtype]
    count = 1
    for size in shape:
        count *= size
    return (packed_bytes(count),), torch.uint8


def packed_bytes(count: int) -> int:
    """Count the bytes of ``count`` bfloat14 values."""
    return (count * VALUE_BITS["bfloat14"] + 7) // 8


def store_values(values: Tensor, value_dtype: str) -> Tensor:
    """Give the stored tensor of values that are already rounded (in the holding dtype)."""
    return _pack14(values.reshape(-1)) if value_dtype == "bfloat14" else values.contiguous()


def read_values(stored: Tensor, shape: tuple[int, ...], value_dtype: str) -> Tensor:
    """Give the values of a stored tensor, in the holding dtype.

    Raises
    ------
    CheckpointError
        The tensor has the wrong shape or dtype for values of this shape, 14-bit values have padding bits set or are
        not finite, or an 8-bit value is -128.
    """
    expect("values", stored, *stored_layout(shape, value_dtype))
    if value_dtype == "int8":
        check_quantized("values", stored)
    return _unpack14(stored, shape) if value_dtype == "bfloat14" else stored


def tensors_of(packed: PackedCoefficients, *names: str) -> list[Tensor]:
    """Give the tensors of these local names, which must be all there are but for the scales, which are checked.

    Raises
    ------
    CheckpointError
        One is missing or unknown, or the scales are not such as ``quantize_rows`` gives.
    """
    scales = scales_layout(packed.out_features, packed.value_dtype)
    expected = {*names, *scales}
    if set(packed.tensors) != expected:
        raise CheckpointError(f"found tensors {sorted(packed.tensors)}, expected {sorted(expected)}")
    for name, (shape, dtype) in scales.items():
        expect(name, packed.tensors[name], shape, dtype)
        check_scales(name, packed.tensors[name])
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


def _pack14(values: Tensor) -> Tensor:
    count = values.numel()
    codes = values.new_zeros((count + 3) // 4 * 4, dtype=torch.int64)
    codes[:count] = (values.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF) >> 2
    codes = codes.reshape(-1, 4)
    words = codes[:, 0] | codes[:, 1] << 14 | codes[:, 2] << 28 | codes[:, 3] << 42
    seven = words.view(torch.uint8).reshape(-1, 8)[:, :7]
    return seven.reshape(-1)[: packed_bytes(count)].clone()


def _unpack14(stored: Tensor, shape: tuple[int, ...]) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    words = stored.new_zeros((count + 3) // 4, 8)
    seven = stored.new_zeros(words.shape[0] * 7)
    seven[: stored.numel()] = stored
    words[:, :7] = seven.reshape(-1, 7)
    word = words.view(torch.int64)
    codes = torch.cat([word >> shift & _CODE for shift in (0, 14, 28, 42)], dim=1).reshape(-1)
    if bool(codes[count:].any()):
        raise CheckpointError("values: padding bits beyond the last value are set")
    if bool((codes & _EXPONENT == _EXPONENT).any()):
        raise CheckpointError("values: NaN or infinity")
    return (codes[:count] << 2).to(torch.int16).view(torch.bfloat16).reshape(shape)
