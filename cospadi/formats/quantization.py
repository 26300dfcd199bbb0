"""Grids of few bits: rows of whole numbers, each row, or each group of numbers in it, with one scale.

The number that is meant is ``whole number * scale``.  Scales have so few significant bits that this product is exact in
float32 and every reader gets the same numbers; it is never below the smallest normal float32, so that hardware which
takes subnormal numbers for zero gets them too.  See docs/format.md, sections 5.2 and 5.3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.errors import CheckpointError, NumericalError

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_MANTISSA_FLOAT64 = 52
_MANTISSA_FLOAT32 = 23


@dataclass(frozen=True)
class Grid:
    """What a row of numbers is rounded to.

    Attributes
    ----------
    bits : int
        Of a whole number.
    group : int or None
        Numbers that have a scale in common, the last group of a row may be shorter; None: a row has one scale.
    """

    bits: int
    group: int | None

    @property
    def lowest(self) -> int:
        """The smallest whole number: -127 in 8 bits, whose range is symmetric, else the extra level is negative."""
        return -127 if self.bits == 8 else -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest whole number."""
        return (1 << (self.bits - 1)) - 1

    @property
    def signed_scales(self) -> bool:
        """Whether a scale may be negative, which puts the extra level on the side of the largest magnitude."""
        return self.lowest != -self.highest

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return torch.float32 if self.group is None else torch.bfloat16

    @property
    def scale_significant_bits(self) -> int:
        """Significant bits of a scale: 16 of the 24 that float32 has, all 8 of bfloat16."""
        return 16 if self.group is None else 8


GRIDS = {
    "int8": Grid(8, None),
    "int6": Grid(6, None),
    "int4": Grid(4, None),
    "int6g64": Grid(6, 64),
    "int5g64": Grid(5, 64),
    "int4g128": Grid(4, 128),
    "int4g64": Grid(4, 64),
    "int4g32": Grid(4, 32),
    "int3g128": Grid(3, 128),
    "int3g64": Grid(3, 64),
    "int3g32": Grid(3, 32),
    "int2g32": Grid(2, 32),
}
"""The grids by the name of the dtype that stores them."""


def grid_of(dtype: str) -> Grid | None:
    """Give the grid of a dtype by its name; None if it is a floating one."""
    return GRIDS.get(dtype)


def scale_shape(n_rows: int, n: int, grid: Grid) -> tuple[int, ...]:
    """Give the shape of the scales of a matrix (n_rows, n): one per row, or (n_rows, groups of a row)."""
    return (n_rows,) if grid.group is None else (n_rows, -(-n // grid.group))


def quantize(rows: Tensor, grid: Grid, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round a matrix to whole numbers times scales.

    A number v becomes v / scale rounded to the nearest whole number, ties to even, and clipped to the range of the
    grid.  Scales that are not given are such that the largest magnitude of the row or group becomes the end of the
    range: max |v| / 127 in 8 bits, where the error is at most scale / 2 for every entry; in fewer bits extreme /
    lowest, where extreme is the number of the largest magnitude, of two opposite ones the negative one, so that a
    number of the other sign may be clipped and be off by little more than one scale.

    Parameters
    ----------
    rows : Tensor, shape (n_rows, n), floating
        float64 passes through float32; not modified.
    grid : Grid
    scales : Tensor, shape ``scale_shape(n_rows, n, grid)``, optional
        As ``representable_scales`` gives them.

    Returns
    -------
    values : Tensor, shape (n_rows, n), int8
        From ``grid.lowest`` to ``grid.highest``.
    scales : Tensor, shape ``scale_shape(n_rows, n, grid)``, ``grid.scale_dtype``
        The given ones, or those of the largest magnitudes.

    Raises
    ------
    NumericalError
        A value is not finite, or not even in float32, or a scale is not one that a file can hold.
    ValueError
        The scales have another shape.
    """
    n_rows, n = rows.shape
    numbers = rows.detach().to(torch.float32)
    if not bool(torch.isfinite(numbers).all()):
        if not bool(torch.isfinite(rows).all()):
            raise NumericalError("values hold NaN or infinity")
        raise NumericalError(f"a value of magnitude {float(rows.abs().max()):g} overflows the float32 of a grid")
    if scales is None:
        scales = _scales_of_extremes(numbers, grid)
    else:
        scales = _given_scales(scales, scale_shape(n_rows, n, grid), grid)
    # float32 is exact enough here: its quotient of a float32 by 16 bits lies on a tie only if the exact one does.  It
    # may overflow under scales that are given, and is clipped then.
    quotients = _grouped(numbers, grid) / _per_group(scales, grid)
    values = quotients.round_().clamp_(grid.lowest, grid.highest).to(torch.int8)
    return values.flatten(1)[:, :n].contiguous(), scales


def dequantize(values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Give float32 from whole numbers, shape (n_rows, n), and their scales; exact for checked scales."""
    products = _grouped(values, grid).to(torch.float32) * _per_group(scales, grid)
    return products.flatten(1)[:, : values.shape[1]].contiguous()


def representable_scales(scales: Tensor, grid: Grid) -> Tensor:
    """Round scales to what a file can hold: to nearest, ties to even, never zero, subnormal or infinite.

    Parameters
    ----------
    scales : Tensor, any shape, floating
        Where the grid has no negative ones their magnitude counts; not modified.
    grid : Grid

    Returns
    -------
    Tensor, same shape, ``grid.scale_dtype``
        With ``grid.scale_significant_bits``, of a magnitude from 2^-126 to the largest whose products are finite.

    Raises
    ------
    NumericalError
        A scale is not finite.
    """
    exact = scales.detach().to(torch.float64)
    if not bool(torch.isfinite(exact).all()):
        raise NumericalError("scales hold NaN or infinity")
    magnitude = _significant(exact.abs(), grid.scale_significant_bits).clamp(_SMALLEST_SCALE, _largest_scale(grid))
    negative = (exact < 0) & grid.signed_scales
    return torch.where(negative, -magnitude, magnitude).to(grid.scale_dtype)


def check_quantized(name: str, values: Tensor, grid: Grid) -> None:
    """Refuse whole numbers, of any shape, beyond the range of a grid.

    Raises
    ------
    CheckpointError
        There is one.
    """
    if values.numel() and not grid.lowest <= int(values.min()) <= int(values.max()) <= grid.highest:
        found = int(values.min()) if int(values.min()) < grid.lowest else int(values.max())
        raise CheckpointError(f"{name}: holds {found}, beyond the range of {grid.lowest} to {grid.highest}")


def check_scales(name: str, scales: Tensor, grid: Grid) -> None:
    """Refuse scales whose products with whole numbers are not exact, finite and normal.

    Raises
    ------
    CheckpointError
        A scale is NaN, infinite, zero or of a magnitude below 2^-126, has a product that overflows, has too many
        significant bits, or is negative where the grid has no negative ones.
    """
    magnitude = scales.abs() if grid.signed_scales else scales
    # Written so that NaN is refused: it compares false with everything.
    if not bool(((magnitude >= _SMALLEST_SCALE) & (magnitude <= _largest_scale(grid))).all()):
        sign = "" if grid.signed_scales else ", is negative"
        raise CheckpointError(
            f"{name}: holds a scale that is not finite{sign}, is below 2^-126 or so large that its products overflow"
        )
    kept = grid.scale_significant_bits
    unused = (1 << (_MANTISSA_FLOAT32 + 1 - kept)) - 1
    if bool((scales.to(torch.float32).contiguous().view(torch.int32) & unused).any()):
        raise CheckpointError(f"{name}: holds a scale of more than {kept} significant bits")


def _scales_of_extremes(numbers: Tensor, grid: Grid) -> Tensor:
    """Give the scales that take the number of the largest magnitude of each row or group to the end of the range."""
    groups = _grouped(numbers, grid) if grid.group else numbers
    highest, lowest = groups.amax(dim=-1), groups.amin(dim=-1)
    extremes = torch.where(-lowest >= highest, lowest, highest).to(torch.float64)
    # In float64, so that the quotient is not rounded to 24 bits before it is rounded to fewer.  By a tensor, since
    # torch multiplies by the reciprocal of a plain number on a GPU, which may miss a tie.
    quotients = torch.div(extremes, torch.full_like(extremes, grid.lowest))
    # A scale that is too small gets a positive one, so that the same numbers always have the same scale.
    return representable_scales(torch.where(quotients.abs() < _SMALLEST_SCALE, _SMALLEST_SCALE, quotients), grid)


def _given_scales(scales: Tensor, shape: tuple[int, ...], grid: Grid) -> Tensor:
    if tuple(scales.shape) != shape:
        raise ValueError(f"found scales of shape {tuple(scales.shape)}, expected {shape}")
    held = representable_scales(scales, grid)
    if not bool((held.to(torch.float64) == scales.to(torch.float64)).all()):
        raise NumericalError("a scale is not one that a file can hold: round scales by representable_scales first")
    return held


def _grouped(rows: Tensor, grid: Grid) -> Tensor:
    """Give a matrix as (n_rows, groups, numbers of a group), the last group of a row padded with zeros."""
    if grid.group is None:
        return rows[:, None]
    n_rows, n = rows.shape
    return functional.pad(rows, (0, -n % grid.group)).reshape(n_rows, -(-n // grid.group), grid.group)


def _per_group(scales: Tensor, grid: Grid) -> Tensor:
    """Give float32 scales that multiply what ``_grouped`` gives."""
    scales = scales.to(torch.float32)[..., None]
    return scales[..., None] if grid.group is None else scales


def _largest_scale(grid: Grid) -> float:
    """Give the largest scale of its significant bits whose product with the largest magnitude is finite in float32."""
    kept = grid.scale_significant_bits
    mantissa, exponent = math.frexp(torch.finfo(torch.float32).max / -grid.lowest)
    return math.ldexp(math.floor(math.ldexp(mantissa, kept)), exponent - kept)


def _significant(numbers: Tensor, bits: int) -> Tensor:
    """Round float64 numbers that are not negative to some significant bits, ties to even."""
    dropped = _MANTISSA_FLOAT64 + 1 - bits
    pattern = numbers.view(torch.int64)
    tie = (pattern >> dropped) & 1
    # Adding just under half of the last kept bit, and that bit itself, rounds to nearest with ties to even; a carry out
    # of the mantissa raises the exponent, as it should.
    pattern = (pattern + ((1 << (dropped - 1)) - 1) + tie) >> dropped << dropped
    return pattern.view(torch.float64)
