"""Numbers on grids, improved one at a time: coordinate descent, and scales refitted to the whole numbers.

Everywhere here the numbers that are rounded together form a column.  With the target t, the current numbers x and a
constant pull p the squared error of a column is (t - x)^T H (t - x) - 2 p^T x, up to a constant.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cospadi.formats import Grid, representable_scales

_BLOCK = 64  # numbers between two matrix products: small enough for the cache, large enough for the products


@dataclass(frozen=True)
class Quadratic:
    """The squared error of every column.

    Attributes
    ----------
    gram : Tensor, shape (n, n), float32
        H.
    target : Tensor, shape (n, n_columns), float32
        t.
    pull : Tensor, shape (n, n_columns), float32, or None
        p; None is zero: the error is least at the target.
    free : array, shape (n, n_columns), uint8, or None
        0 where a number is zero and stays so; None: all are free.
    """

    gram: Tensor
    target: Tensor
    pull: Tensor | None = None
    free: NDArray[np.uint8] | None = None


def descend(problem: Quadratic, wholes: Tensor, scales: Tensor, grid: Grid, sweeps: int) -> tuple[Tensor, Tensor]:
    """Refit the scales and re-round every number given all others, some times over; no step raises the error.

    Ends with a re-rounding, so that, up to the rounding of float32, no single number could move to a better place.

    Parameters
    ----------
    problem : Quadratic
    wholes : Tensor, shape (n, n_columns), float32
        Whole numbers to start from; not modified.
    scales : Tensor, shape (n_groups, n_columns), float32
        Representable; not modified.
    grid : Grid
    sweeps : int

    Returns
    -------
    wholes, scales : Tensor
        Of the same shapes.
    """
    n = problem.target.shape[0]
    width = grid.group or max(n, 1)
    for _ in range(sweeps):
        scales = _refit_scales(problem, wholes, scales, grid, width)
        wholes = _sweep(problem, wholes, scales, grid, width)
    return wholes, scales


def _sweep(problem: Quadratic, wholes: Tensor, scales: Tensor, grid: Grid, width: int) -> Tensor:
    from cospadi.solvers.rounding.kernels import round_coordinates

    n, n_columns = problem.target.shape
    place = np.arange(n) // width
    numbers = wholes * scales[place]
    errors = problem.target - numbers
    low_high = np.float32(grid.lowest), np.float32(grid.highest)
    everywhere = np.ones((_BLOCK, n_columns), np.uint8)
    scale_array = np.ascontiguousarray(scales.numpy())
    for low in range(0, n, _BLOCK):
        high = min(n, low + _BLOCK)
        slopes = _slopes(problem, errors, low, high)
        steps = torch.empty_like(slopes)
        round_coordinates(
            slopes.numpy(),
            problem.gram[low:high, low:high].contiguous().numpy(),
            numbers[low:high].numpy(),
            scale_array,
            place[low:high],
            everywhere[: high - low] if problem.free is None else problem.free[low:high],
            *low_high,
            steps.numpy(),
        )
        errors[low:high] -= steps
    return (numbers / scales[place]).round_().clamp_(grid.lowest, grid.highest)


def _refit_scales(problem: Quadratic, wholes: Tensor, scales: Tensor, grid: Grid, width: int) -> Tensor:
    """Give each scale its least-squares value in turn, rounded to what a file can hold, where that lowers the error."""
    n = problem.target.shape[0]
    scales = scales.clone()
    errors = problem.target - wholes * scales[np.arange(n) // width]
    for group in range(scales.shape[0]):
        low, high = group * width, min(n, (group + 1) * width)
        q = wholes[low:high]
        slope = (q * _slopes(problem, errors, low, high)).sum(dim=0)
        curvature = (q * (problem.gram[low:high, low:high] @ q)).sum(dim=0)
        old = scales[group]
        step = torch.where(curvature > 0, slope / curvature.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        wanted = torch.where(torch.isfinite(old + step), old + step, old)
        new = representable_scales(wanted, grid).to(torch.float32)
        step = new - old
        gains = step * (2 * slope - step * curvature) > 0
        scales[group] = torch.where(gains, new, old)
        errors[low:high] -= q * torch.where(gains, step, 0.0)
    return scales


def _slopes(problem: Quadratic, errors: Tensor, low: int, high: int) -> Tensor:
    slopes = problem.gram[low:high] @ errors
    return slopes if problem.pull is None else slopes + problem.pull[low:high]
