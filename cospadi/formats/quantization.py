"""Eight-bit factors: rows of whole numbers from -127 to 127, each row with one scale.

A scale has 16 significant bits, so that its product with a whole number of 7 bits is exact in float32 and every reader
gets the same numbers; it is never below the smallest normal float32, so that hardware which takes subnormal numbers
for zero gets them too.  See docs/format.md, section 5.2.
"""

import torch
from torch import Tensor

from cospadi.errors import CheckpointError, NumericalError

LARGEST = 127
"""The largest whole number; -128 stays unused, so that the range is symmetric."""

SCALE_BITS = 32
"""Bits of one stored scale, a float32."""

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_DROPPED_IN_FLOAT64 = 52 - 15  # bits of a float64 mantissa beyond 16 significant ones
_UNUSED_IN_FLOAT32 = (1 << (23 - 15)) - 1  # mask of the mantissa bits of a float32 that a scale leaves zero


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round a matrix to whole numbers times one scale per row.

    The scale is max |v| / 127 rounded to 16 significant bits, ties to even, and at least 2^-126; a value v becomes
    v / scale rounded to the nearest whole number, ties to even.  So the error is at most scale / 2 for every entry.

    Parameters
    ----------
    rows : Tensor, shape (n_rows, n), floating
        float64 passes through float32; not modified.

    Returns
    -------
    values : Tensor, shape (n_rows, n), int8
        From -127 to 127.
    scales : Tensor, shape (n_rows,), float32

    Raises
    ------
    NumericalError
        A value is not finite, or not even in float32.
    """
    numbers = rows.detach().to(torch.float32)
    largest = numbers.abs().amax(dim=1)
    if not bool(torch.isfinite(largest).all()):
        if not bool(torch.isfinite(rows).all()):
            raise NumericalError("values hold NaN or infinity")
        raise NumericalError(f"a value of magnitude {float(rows.abs().max()):g} overflows the float32 scales of int8")
    # In float64, so that the quotient is not rounded to 24 bits before it is rounded to 16.  By a tensor, since torch
    # multiplies by the reciprocal of a plain number on a GPU, which may miss a tie.
    quotients = torch.div(largest.to(torch.float64), torch.full_like(largest, LARGEST, dtype=torch.float64))
    scales = _significant(quotients).clamp_min_(_SMALLEST_SCALE).to(torch.float32)
    # float32 is exact enough here: its quotient of a float32 by 16 bits lies on a tie only if the exact one does.
    values = (numbers / scales[:, None]).round_().to(torch.int8)
    return values, scales


def dequantize_rows(values: Tensor, scales: Tensor) -> Tensor:
    """Give float32 from int8 rows, shape (n_rows, n), and their scales, shape (n_rows,); exact for checked scales."""
    return values.to(torch.float32).mul_(scales[:, None])


def check_quantized(name: str, values: Tensor) -> None:
    """Refuse -128 in int8 values of any shape.

    Raises
    ------
    CheckpointError
        It occurs.
    """
    if values.numel() and int(values.min()) < -LARGEST:
        raise CheckpointError(f"{name}: holds -128, beyond the range of -127 to 127")


def check_scales(name: str, scales: Tensor) -> None:
    """Refuse scales whose products with whole numbers are not exact, finite and normal.

    Raises
    ------
    CheckpointError
        A scale is NaN, infinite, negative, zero or another number below 2^-126, has a product that overflows, or more
        than 16 significant bits.
    """
    # Written so that NaN is refused: it compares false with everything.
    fits = (scales >= _SMALLEST_SCALE) & torch.isfinite(scales * LARGEST)
    if not bool(fits.all()):
        raise CheckpointError(
            f"{name}: holds a scale that is not finite, is below 2^-126, or is so large that its products overflow"
        )
    if bool((scales.contiguous().view(torch.int32) & _UNUSED_IN_FLOAT32).any()):
        raise CheckpointError(f"{name}: holds a scale of more than 16 significant bits")


def _significant(numbers: Tensor) -> Tensor:
    """Round positive float64 numbers to 16 significant bits, ties to even."""
    bits = numbers.view(torch.int64)
    tie = (bits >> _DROPPED_IN_FLOAT64) & 1
    # Adding just under half of the last kept bit, and that bit itself, rounds to nearest with ties to even; a carry out
    # of the mantissa raises the exponent, as it should.
    bits = (bits + ((1 << (_DROPPED_IN_FLOAT64 - 1)) - 1) + tie) >> _DROPPED_IN_FLOAT64 << _DROPPED_IN_FLOAT64
    return bits.view(torch.float64)
