"""Least squares on given supports by conjugate gradients, all columns at once."""

from cospadi.arrays import Array, namespace
from cospadi.solvers.updates import (
    quotient,
    squared_columns,
)


def conjugate_gradients(G: Array, C: Array, S: Array, steps: int) -> Array:
    """Approach min ||y - A s||^2 on the support of each column (Hestenes, Stiefel 1952); the support is kept.

    Parameters
    ----------
    G : array, shape (n_atoms, n_atoms)
        A^T A.
    C : array, shape (n_atoms, n_columns)
        A^T (Y - A S).
    S : array, shape (n_atoms, n_columns)
    steps : int

    Returns
    -------
    S : array
        The error of no column has risen.
    """
    xp = namespace(G, S)
    mask = xp.astype(S != 0, S.dtype)
    residual = C * mask
    direction = residual
    energy = squared_columns(residual)
    for _ in range(steps):
        image = (G @ direction) * mask
        length = column_steps(energy, direction, image)[None, :]
        S = S + length * direction
        residual = residual - length * image
        previous, energy = energy, squared_columns(residual)
        direction = residual + quotient(energy, previous)[None, :] * direction
    return S


def column_steps(energy: Array, direction: Array, image: Array) -> Array:
    """Give energy / <direction, image> of each column: the step to the minimum, zero where there is no curvature.

    With atoms of unit norm a curvature of a few roundings is that of a null direction: a step along it is noise.
    """
    xp = namespace(direction)
    floor = 64 * float(xp.finfo(direction.dtype).eps) * squared_columns(direction)
    curvature = _inner_columns(direction, image)
    return quotient(energy, xp.where(curvature > floor, curvature, xp.zeros_like(curvature)))


def _inner_columns(U: Array, V: Array) -> Array:
    return namespace(U).sum(U * V, axis=0)
