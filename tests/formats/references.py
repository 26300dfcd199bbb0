"""Slow and obvious rounding in exact fractions, for comparison."""

from fractions import Fraction

import torch


def nearest_whole(rows):
    """Whole numbers, scales and their products for a float32 matrix, row by row in exact arithmetic."""
    smallest = Fraction(2) ** -126
    values, scales = [], []
    for row in rows.to(torch.float64).tolist():
        exact = [Fraction(v) for v in row]
        scale = max(sixteen_bits(max(abs(v) for v in exact) / 127), smallest)
        values.append([round(v / scale) for v in exact])  # Fraction rounds ties to even
        scales.append(float(scale))
    whole = torch.tensor(values, dtype=torch.int64)
    exact_scales = torch.tensor(scales, dtype=torch.float64)
    products = whole.to(torch.float64) * exact_scales[:, None]
    return whole, exact_scales.to(torch.float32), products.to(torch.float32)


def sixteen_bits(number):
    """The nearest number of 16 significant bits, of two equally near the even one."""
    if number == 0:
        return number
    step = Fraction(1)
    while number / step >= 2**16:
        step *= 2
    while number / step < 2**15:
        step /= 2
    return round(number / step) * step
