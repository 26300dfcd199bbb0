"""Warm-started coding: the support of the last alternation, with a few atoms of each column exchanged."""

import numpy as np
from array_api_compat import device

from cospadi.arrays import Array, convert, namespace
from cospadi.solvers.coders import Coder
from cospadi.solvers.conjugate_gradients import conjugate_gradients
from cospadi.solvers.updates import hard_threshold, least_squares_dictionary, squared_columns, unit_columns

SAMPLE_COLUMNS = 64
"""Columns on which the pursuit and the exchange are compared."""
POLISH_CG_STEPS = 10
POLISH_RELAXATION = 1.4
WORTH = 0.99
"""The pursuit is worth its time where it brings the squared error below this part of the exchange's."""


def exchange_atoms(A: Array, S: Array, residual: Array, n_nonzero: int, relaxation: float, cg_steps: int) -> Array:
    """Give coefficients on a support that follows the old one by a step of hard thresholding pursuit (Foucart 2011).

    A gradient step of each column, ``relaxation`` times as long as the exact line search has it; the largest entries;
    conjugate gradients on the new support.  A step longer than the exact one lets atoms in that an exact step leaves
    out although they would pay once all coefficients are refitted.  The caller keeps a column only where it improved.

    Parameters
    ----------
    A : array, shape (in_features, n_atoms)
        Atoms of unit norm, or zero.
    S : array, shape (n_atoms, n_columns)
    residual : array, shape (in_features, n_columns)
        Y - A S.
    n_nonzero : int
        Largest number of non-zeros per column.
    relaxation : float
        Length of the gradient step, in units of the exact one.
    cg_steps : int
        Conjugate gradient steps.

    Returns
    -------
    S : array, shape (n_atoms, n_columns)
    """
    xp = namespace(A, S, residual)
    gram, gradient = A.T @ A, A.T @ residual
    energy = squared_columns(gradient)
    # Unit atoms: a curvature of a few roundings is that of a null direction.
    floor = 64 * float(xp.finfo(S.dtype).eps) * energy
    image = gram @ gradient
    image *= gradient  # in place, here and below: at these sizes fresh memory costs as much as the arithmetic
    curvature = xp.sum(image, axis=0)
    flat = curvature <= floor
    length = xp.where(flat, xp.zeros_like(energy), energy / xp.where(flat, xp.ones_like(energy), curvature))
    moved = (relaxation * length)[None, :] * gradient
    moved += S
    moved = hard_threshold(moved, n_nonzero)
    gradient -= gram @ (moved - S)
    return conjugate_gradients(gram, gradient, moved, cg_steps)


def better_columns(
    Y: Array, A: Array, S: Array, residual: Array, energies: Array, candidate: Array
) -> tuple[Array, Array, float]:
    """Take from ``candidate`` the columns whose error is below ``energies``.

    Parameters
    ----------
    energies : array, shape (n_columns,)
        Squared errors of S, whose residual is ``residual``.

    Returns
    -------
    S, residual : array
        New arrays.
    improved : float
        Part of the squared error that the improved columns had.
    """
    xp = namespace(Y)
    fresh = Y - A @ candidate
    better = squared_columns(fresh) < energies
    total = float(xp.sum(energies))
    improved = float(xp.sum(xp.where(better, energies, xp.zeros_like(energies)))) / total if total > 0 else 0.0
    better = better[None, :]
    return xp.where(better, candidate, S), xp.where(better, fresh, residual), improved


def pursuit_pays(
    Y: Array, A: Array, S: Array, residual: Array, n_nonzero: int, coder: Coder, relaxation: float, cg_steps: int
) -> bool:
    """Tell, from a sample of the columns, whether a coder lowers the error by more than an exchange.

    It does with coherent atoms, such as random columns of the target, where an exchange hardly moves the support.
    """
    xp = namespace(Y)
    # By size and not by place: permuting the columns must permute the result.
    order = np.argsort(convert(squared_columns(Y), "numpy"), kind="stable")
    sample = xp.asarray(order[:: max(1, order.size // SAMPLE_COLUMNS)].copy(), device=device(Y))
    Y, S, residual = (xp.take(array, sample, axis=1) for array in (Y, S, residual))
    errors = []
    for candidate in (
        exchange_atoms(A, S, residual, n_nonzero, relaxation, cg_steps),
        coder.encode(A, Y, n_nonzero).coefficients,
    ):
        kept = better_columns(Y, A, S, residual, squared_columns(residual), candidate)[1]
        errors.append(float(xp.sum(squared_columns(kept))))
    return errors[1] < WORTH * errors[0]


def polished(Y: Array, A: Array, S: Array, n_nonzero: int, alternations: int, cg_steps: int) -> tuple[Array, Array]:
    """Refine a dictionary and its coefficients; the error of no step rises.

    Alternations of least-squares dictionary and exchange, which is hard thresholding pursuit that keeps a column where
    it was better; a last dictionary if there were any; conjugate gradients on the support.

    Returns
    -------
    A : array, shape (in_features, n_atoms)
        Atoms of unit norm, or zero.
    S : array, shape (n_atoms, n_columns)
    """
    residual = Y - A @ S
    for _ in range(alternations):
        A, S, residual = least_squares_refit(Y, A, S, residual)
        candidate = exchange_atoms(A, S, residual, n_nonzero, POLISH_RELAXATION, cg_steps)
        S, residual, _ = better_columns(Y, A, S, residual, squared_columns(residual), candidate)
    if alternations:
        A, S, residual = least_squares_refit(Y, A, S, residual)
    refined = conjugate_gradients(A.T @ A, A.T @ residual, S, POLISH_CG_STEPS)
    return A, better_columns(Y, A, S, residual, squared_columns(residual), refined)[0]


def least_squares_refit(Y: Array, A: Array, S: Array, residual: Array) -> tuple[Array, Array, Array]:
    """Refit all atoms by least squares; give unit atoms, the coefficients scaled to match, and their residual.

    ``residual`` is Y - A S of the old ones, which are kept where they are no worse: the ridge of the least squares may
    cost more than there is to gain.
    """
    xp = namespace(Y)
    atoms, sizes = unit_columns(least_squares_dictionary(Y, S, A))
    rows = S * sizes[:, None]
    fresh = Y - atoms @ rows
    if float(xp.sum(squared_columns(fresh))) < float(xp.sum(squared_columns(residual))):
        return atoms, rows, fresh
    return A, S, residual
