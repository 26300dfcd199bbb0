"""Scales of grids that lose less than those of the largest magnitudes."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cospadi.errors import NumericalError
from cospadi.formats import Grid, dequantize, quantize, representable_scales

FloatArray = NDArray[np.float32]

_COARSE = 32
_SMALLEST_FACTOR = 0.1
"""Of the scale that reaches the largest magnitude: one outlier that weighs little may be clipped that much."""
_FINE = (1.0, *(1 + step / 200 for step in range(-8, 9) if step))
"""Around the best of the coarse ones, which are 8 % apart: in many bits the error has a minimum every per cent."""


def search_scales(rows: Tensor, grid: Grid, weights: Tensor | None = None) -> Tensor:
    """Give scales under which rounding to nearest loses little: sum_i h_i (v_i - q_i)^2 of each row or group.

    A few dozen candidates of both signs are tried.  Never worse than the scales of the largest magnitudes, which
    ``quantize`` takes by itself.

    Parameters
    ----------
    rows : Tensor, shape (n_rows, n), floating
        Not modified.
    grid : Grid
    weights : Tensor, shape (n,), floating, optional
        h, not negative; all ones if not given.

    Returns
    -------
    Tensor, shape ``scale_shape(n_rows, n, grid)``, ``grid.scale_dtype``

    Raises
    ------
    NumericalError
        A value is not finite, or a weight negative or not finite.
    """
    n = rows.shape[1]
    weights = torch.ones(n, dtype=torch.float64) if weights is None else weights.to(torch.float64)
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise NumericalError("the weights of a scale search must be finite and not negative")
    values, plain = quantize(rows, grid)
    columns = np.ascontiguousarray(rows.detach().to(torch.float32).T.numpy())
    largest = float(weights.max()) if n else 0.0
    h = (weights / largest if largest > 0 else weights).clamp_min(1e-12).to(torch.float32).numpy()
    width = grid.group or max(n, 1)
    found = [best_scales(columns[low : low + width], h[low : low + width], grid) for low in range(0, n, width)]
    if not found:
        return plain
    searched = np.stack(found, axis=1) if grid.group is not None else found[0]
    scales = representable_scales(torch.from_numpy(searched), grid)
    # The search counts in float32 and with scales before their own rounding: the law is kept by comparing exactly.
    better = _group_errors(rows, weights, quantize(rows, grid, scales)[0], scales, grid) < _group_errors(
        rows, weights, values, plain, grid
    )
    return torch.where(better, scales, plain)


def best_scales(columns: FloatArray, weights: FloatArray, grid: Grid) -> FloatArray:
    """Give a scale for each column, shape (n, n_columns), not yet rounded to what a file can hold."""
    from cospadi.solvers.rounding.kernels import search_scales as search

    lowest, highest = np.float32(grid.lowest), np.float32(grid.highest)
    largest = np.abs(columns).max(axis=0)
    # Columns of one size: their squares stay in the range of float32.  A column of zeros is content with any scale.
    sizes = np.maximum(largest, np.finfo(np.float32).tiny)
    columns = columns / sizes
    factors = np.geomspace(_SMALLEST_FACTOR, -grid.lowest / grid.highest, _COARSE)
    factors = np.concatenate([[1.0], factors, -factors] if grid.signed_scales else [[1.0], factors])
    scales = np.full(columns.shape[1], -1 / grid.lowest, np.float32)
    for tried in (factors, np.array(_FINE)):
        bases, scales = scales, np.empty_like(scales)
        search(columns, weights, bases, tried.astype(np.float32), lowest, highest, scales)
    return scales * sizes


def power_of_two(numbers: Tensor) -> Tensor:
    """Give powers of two near positive float64 numbers, to divide by without rounding; 1 for zero."""
    return torch.where(numbers > 0, torch.exp2(torch.floor(torch.log2(numbers.clamp_min(1e-300)))), 1.0)


def _group_errors(rows: Tensor, weights: Tensor, values: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Give the weighted squared error of each scale, in float64, in the shape of the scales."""
    errors = (rows.to(torch.float64) - dequantize(values, scales, grid)).square() * weights
    if grid.group is None:
        return errors.sum(dim=1)
    n_rows, n = rows.shape
    errors = torch.nn.functional.pad(errors, (0, -n % grid.group))
    return errors.reshape(n_rows, -1, grid.group).sum(dim=2)
