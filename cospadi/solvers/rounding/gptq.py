"""Rows of a matrix rounded in the metric of a Gram: sequentially with error feedback, then by coordinate descent."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError
from cospadi.formats import Grid, dequantize, quantize, representable_scales
from cospadi.solvers.rounding.descent import Quadratic, descend
from cospadi.solvers.rounding.scales import FloatArray, best_scales, power_of_two

_BLOCK = 128  # numbers between two matrix products where a row has one scale
_NEAR = (1.0, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15)
"""Scales that the feedback within a group is tried with, relative to the best one without feedback."""


@dataclass(frozen=True)
class RoundedRows:
    """A matrix on a grid.

    Attributes
    ----------
    values : Tensor, shape (n_rows, n), int8
        Whole numbers.
    scales : Tensor, shape ``scale_shape(n_rows, n, grid)``, ``grid.scale_dtype``
    statistics : dict
        ``relative_error`` and ``nearest_error`` (of rounding to nearest by the largest magnitudes): root of the squared
        error over the squared size in the metric; ``damping`` of the Gram relative to each diagonal entry;
        ``zero_features``; ``nearest_rows``: rows where rounding to nearest was no worse and was kept.
    """

    values: Tensor
    scales: Tensor
    statistics: dict[str, float | int | str] = field(default_factory=dict)


def round_rows(rows: Tensor, gram: Tensor, grid: Grid, *, damping: float = 0.01, sweeps: int = 3) -> RoundedRows:
    """Round every row w to numbers q of a grid with a small (w - q)^T G (w - q).

    GPTQ (Frantar et al. 2022, arXiv 2210.17323): one number after the other, in the stored order, what comes later
    makes up for the errors before.  With the damped Gram T T^T, T upper triangular, the error is the sum of
    T_jj^2 (c_j - q_j)^2, c_j = w_j + sum_{i<j} T_ij / T_jj (w_i - q_i), so that neither the inverse of the Gram nor its
    factor is needed.  Differs from the paper in that a group's scale is chosen by rounding the whole group under
    several candidates, in that damping is relative to each feature's own energy (features of very different sizes are
    common), and in the coordinate descent that follows on the undamped Gram.

    Law: the error of no row is above that of rounding to nearest by the largest magnitudes.

    Parameters
    ----------
    rows : Tensor, shape (n_rows, n), floating, on the CPU
        Not modified.
    gram : Tensor, shape (n, n), floating
        G, positive semi-definite; zeros (no token seen) count as the identity.
    grid : Grid
    damping : float
        Added to every diagonal entry, relative to that entry; ten times more until the factorisation succeeds.
    sweeps : int
        Of the coordinate descent; 0: none.

    Raises
    ------
    NumericalError
        The rows or the Gram hold NaN or infinity, or the Gram is far from positive semi-definite.
    UsageError
        ``damping`` or ``sweeps`` is negative.
    """
    if damping < 0 or sweeps < 0:
        raise UsageError(f"damping={damping}, sweeps={sweeps}: expected 0 or more")
    nearest, nearest_scales = quantize(rows, grid)
    gram = unit_gram(gram)
    if 0 in rows.shape:
        return RoundedRows(nearest, nearest_scales)
    exact = rows.detach().to(torch.float64)
    size = float(power_of_two(exact.abs().max()))
    weights, feedback, used = _feedback(gram, damping)
    columns = (exact.T / size).to(torch.float32).contiguous()
    wholes, scales = _sequential(columns, weights, feedback, grid, size)
    del feedback
    wholes, scales = descend(Quadratic(gram.to(torch.float32), columns), wholes, scales, grid, sweeps)
    values = wholes.T.contiguous().to(torch.int8)
    rounded_scales = representable_scales((scales[0] if grid.group is None else scales.T) * size, grid)

    errors = row_errors(exact - dequantize(values, rounded_scales, grid), gram)
    plain = row_errors(exact - dequantize(nearest, nearest_scales, grid), gram)
    better = errors < plain
    values = torch.where(better[:, None], values, nearest)
    rounded_scales = torch.where(
        better if grid.group is None else better[:, None], rounded_scales, nearest_scales
    ).contiguous()
    norm = float(row_errors(exact, gram).sum())
    statistics: dict[str, float | int | str] = {
        "relative_error": _relative(float(torch.where(better, errors, plain).sum()), norm),
        "nearest_error": _relative(float(plain.sum()), norm),
        "damping": used,
        "zero_features": int((gram.diagonal() <= 0).sum()),
        "nearest_rows": int((~better).sum()),
    }
    return RoundedRows(values, rounded_scales, statistics)


def nearest_rows(rows: Tensor, gram: Tensor, grid: Grid) -> RoundedRows:
    """Round to nearest by the largest magnitudes; the Gram only judges.

    Raises
    ------
    NumericalError
        The rows or the Gram hold NaN or infinity.
    """
    values, scales = quantize(rows, grid)
    gram = unit_gram(gram)
    error = float(row_errors(rows - dequantize(values, scales, grid), gram).sum())
    relative = _relative(error, float(row_errors(rows, gram).sum()))
    return RoundedRows(values, scales, {"relative_error": relative, "nearest_error": relative})


def unit_gram(gram: Tensor) -> Tensor:
    """Give a Gram in float64, divided by the mean of its positive diagonal entries; the identity for one of zeros.

    Raises
    ------
    NumericalError
        It holds NaN or infinity.
    """
    gram = gram.detach().to(torch.float64)
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError("the Gram holds NaN or infinity")
    positive = gram.diagonal()[gram.diagonal() > 0]
    return gram / float(positive.mean()) if positive.numel() else torch.eye(gram.shape[0], dtype=torch.float64)


def upper_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Give the upper triangular T of G + damping * diag(G) = T T^T, float64, and the damping that was needed.

    Features that are always zero become independent ones of very little energy.

    Raises
    ------
    NumericalError
        The Gram is far from positive semi-definite.
    """
    diagonal = gram.diagonal()
    alive = diagonal > 0
    energy = torch.where(alive, diagonal, float(diagonal[alive].mean()) * 1e-6 if bool(alive.any()) else 1.0)
    level = damping
    while level <= 1:
        # The factor of the reversed matrix, reversed.
        damped = gram.flip(0, 1)
        damped.diagonal().copy_(((1 + level) * energy).flip(0))
        factor, info = torch.linalg.cholesky_ex(damped)
        del damped
        pivots = factor.diagonal().square() / energy.flip(0)
        if int(info) == 0 and bool((pivots > 1e-12).all()):
            return factor.flip(0, 1), level
        level = max(level * 10, 1e-8)
    raise NumericalError("the Gram is not positive semi-definite: its factorisation fails even when damped")


def row_errors(differences: Tensor, gram: Tensor) -> Tensor:
    """Give e^T G e of each row e, shape (n_rows,), in float64."""
    differences = differences.to(torch.float64)
    return ((differences @ gram) * differences).sum(dim=1)


def _feedback(gram: Tensor, damping: float) -> tuple[FloatArray, Tensor, float]:
    """Give the weights of the numbers, what their errors ask of those after them, and the damping that was needed."""
    triangle, used = upper_factor(gram, damping)
    weights = triangle.diagonal().square().to(torch.float32).numpy()
    return weights, triangle.div_(triangle.diagonal().clone()).to(torch.float32), used


def _sequential(
    columns: Tensor, weights: FloatArray, feedback: Tensor, grid: Grid, size: float
) -> tuple[Tensor, Tensor]:
    """Round with feedback; gives whole numbers (n, n_columns) and scales (n_groups, n_columns), relative to size."""
    from cospadi.solvers.rounding.kernels import round_sequentially

    n, n_columns = columns.shape
    width = grid.group or _BLOCK
    n_blocks = -(-n // width)
    wholes, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales = torch.empty(n_blocks, n_columns, dtype=torch.float32)
    fixed = None if grid.group is not None else _held(best_scales(columns.numpy(), weights, grid), grid, size)[None]
    for block in range(n_blocks):
        low, high = block * width, min(n, (block + 1) * width)
        own = feedback[low:high, low:high].contiguous()
        current = columns[low:high]
        if low:
            # The block's numbers that would be best if they could be real: its scales are fixed from these.
            moved = feedback[:low, low:high].T @ errors[:low]
            current = current + torch.linalg.solve_triangular(own.T, moved, upper=False, unitriangular=True)
        current = current.contiguous()
        candidates = fixed
        if candidates is None:
            found = best_scales(current.numpy(), weights[low:high], grid)
            candidates = np.stack([_held(found * np.float32(factor), grid, size) for factor in _NEAR])
        round_sequentially(
            current.numpy(),
            own.numpy(),
            weights[low:high],
            candidates,
            np.float32(grid.lowest),
            np.float32(grid.highest),
            wholes[low:high].numpy(),
            scales[block].numpy(),
        )
        errors[low:high] = columns[low:high] - wholes[low:high] * scales[block]
    return wholes, scales if grid.group is not None else scales[:1].clone()


def _held(scales: FloatArray, grid: Grid, size: float) -> FloatArray:
    """Round scales of numbers that were divided by ``size`` to what a file can hold."""
    return (representable_scales(torch.from_numpy(scales).double() * size, grid).double() / size).float().numpy()


def _relative(squared: float, norm: float) -> float:
    return (squared / norm) ** 0.5 if norm > 0 else 0.0
