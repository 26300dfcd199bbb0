"""Slow and obvious rounding in exact fractions, for comparison."""

from fractions import Fraction

import torch

SMALLEST = Fraction(2) ** -126
LARGEST = (2 - Fraction(2) ** -23) * 2**127


def nearest_whole(rows, bits=8, group=None):
    """Whole numbers, scales and their products for a float32 matrix, row by row in exact arithmetic."""
    n = rows.shape[1]
    values, scales, products = [], [], []
    for row in rows.to(torch.float64).tolist():
        exact = [Fraction(v) for v in row]
        parts = [exact[first : first + (group or n)] for first in range(0, n, group or n)]
        own = [scale_of(part, bits, 16 if group is None else 8) for part in parts]
        lowest, highest = ends(bits)
        whole = [
            [min(max(round(v / scale), lowest), highest) for v in part]  # Fraction rounds ties to even
            for part, scale in zip(parts, own, strict=True)
        ]
        values.append([q for part in whole for q in part])
        products.append([float(q * scale) for part, scale in zip(whole, own, strict=True) for q in part])
        scales.append([float(scale) for scale in own])
    scales = torch.tensor(scales, dtype=torch.float64).to(torch.float32 if group is None else torch.bfloat16)
    return (
        torch.tensor(values, dtype=torch.int64),
        scales[:, 0] if group is None else scales,
        torch.tensor(products, dtype=torch.float64).to(torch.float32),
    )


def ends(bits):
    """The smallest and the largest whole number of a grid."""
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def scale_of(part, bits, significant):
    """The scale that takes the number of the largest magnitude to the end of the range."""
    lowest, _ = ends(bits)
    largest = max(abs(v) for v in part)
    extreme = -largest if bits == 8 or -largest in part else largest
    scale = extreme / lowest
    if abs(scale) < SMALLEST:
        return SMALLEST
    scale = rounded(scale, significant)
    if abs(scale * lowest) > LARGEST:
        scale = rounded(LARGEST / -lowest, significant, down=True) * (1 if scale > 0 else -1)
    return scale


def rounded(number, significant, down=False):
    """The nearest number of some significant bits, of two equally near the even one; or the next one towards zero."""
    if number == 0:
        return number
    step = Fraction(1)
    while abs(number) / step >= 2**significant:
        step *= 2
    while abs(number) / step < 2 ** (significant - 1):
        step /= 2
    return (int(number / step) if down else round(number / step)) * step
