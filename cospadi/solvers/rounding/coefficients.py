"""Sparse coefficients rounded to a grid on their support."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError
from cospadi.formats import Grid, dequantize, quantize, representable_scales
from cospadi.solvers.rounding.descent import Quadratic, descend
from cospadi.solvers.rounding.scales import best_scales, power_of_two


@dataclass(frozen=True)
class RoundedCoefficients:
    """S^T on a grid.

    Attributes
    ----------
    values : Tensor, shape (out_features, n_atoms), int8
        Whole numbers; zero outside the support, and where a coefficient was rounded to zero.
    scales : Tensor, shape (out_features,), float32
    """

    values: Tensor
    scales: Tensor


def round_coefficients(
    dictionary: Tensor, target: Tensor, coefficients: Tensor, grid: Grid, *, sweeps: int = 2
) -> RoundedCoefficients:
    """Round every column s to a grid on its support with a small ||y - A s||^2.

    The best of a few dozen scales in the diagonal metric, rounding to nearest, then coordinate descent with refitted
    scales.  Law: the error of no column is above that of rounding to nearest by the largest magnitude.

    Parameters
    ----------
    dictionary : Tensor, shape (in_features, n_atoms), floating, on the CPU
        Whitened: A = L^T D.
    target : Tensor, shape (in_features, n_columns)
        Y.
    coefficients : Tensor, shape (n_atoms, n_columns)
        S, with zeros outside the support.
    grid : Grid
        With one scale per row.
    sweeps : int
        Of the coordinate descent.

    Raises
    ------
    UsageError
        The grid has groups.
    NumericalError
        NaN or infinity.
    """
    require_column_scales(grid)
    for what, matrix in (("dictionary", dictionary), ("target", target)):
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError(f"the {what} holds NaN or infinity")
    rows = coefficients.detach().T.contiguous()
    nearest, nearest_scales = quantize(rows, grid)
    if 0 in rows.shape:
        return RoundedCoefficients(nearest, nearest_scales)
    # Atoms, columns of S and the target each in a size near one, by powers of two: nothing over- or underflows.
    A = dictionary.detach().to(torch.float64)
    S = coefficients.detach().to(torch.float64)
    Y = target.detach().to(torch.float64)
    size = power_of_two(A.abs().amax())
    sizes = power_of_two(S.abs().amax(dim=0))
    A, S, Y = A / size, S / sizes, Y / (size * sizes)
    columns = S.to(torch.float32).contiguous()
    gram = (A.T @ A).to(torch.float32)
    energies = gram.diagonal()
    weights = energies.clamp_min(float(energies.max()) * 1e-12 + torch.finfo(torch.float32).tiny)
    found = best_scales(columns.numpy(), weights.contiguous().numpy(), grid)
    scales = (representable_scales(torch.from_numpy(found).double() * sizes, grid).double() / sizes).float()[None]
    wholes = (columns / scales).round_().clamp_(grid.lowest, grid.highest)
    residual = Y - A @ S
    problem = Quadratic(gram, columns, (A.T @ residual).to(torch.float32), (columns != 0).numpy().astype(np.uint8))
    wholes, scales = descend(problem, wholes, scales, grid, sweeps)
    values = wholes.T.contiguous().to(torch.int8)
    held = representable_scales(scales[0].double() * sizes, grid)

    def errors(values: Tensor, scales: Tensor) -> Tensor:
        moved = S - dequantize(values, scales, grid).T.to(torch.float64) / sizes
        return (residual + A @ moved).square().sum(dim=0)

    better = errors(values, held) < errors(nearest, nearest_scales)
    return RoundedCoefficients(torch.where(better[:, None], values, nearest), torch.where(better, held, nearest_scales))


def require_column_scales(grid: Grid) -> None:
    """Refuse a grid with groups: a column of S has one scale.

    Raises
    ------
    UsageError
        It has groups.
    """
    if grid.group is not None:
        raise UsageError(
            f"coefficients have one scale per column, not one per {grid.group} numbers: choose int8, int6 or int4"
        )
