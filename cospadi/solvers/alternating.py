"""Learners that alternate between coding the columns and refitting the dictionary."""

import abc
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from array_api_compat import device

from cospadi.arrays import Array, convert, namespace
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.coders import Coder, as_coder
from cospadi.solvers.updates import spectral_start, squared_columns, unit_columns

DUPLICATE = 0.9999
"""Two atoms are the same one when the magnitude of their inner product exceeds this."""


@dataclass(frozen=True, kw_only=True)
class AlternatingSolver(Solver):
    """Base of K-SVD and MOD: min ||Y - A S||^2 by turns over S (a coder) and over A (the subclass).

    A column keeps its coefficients of the last alternation where the coder finds none better, so the error never rises
    between alternations (only the rare merging of two equal atoms may raise it; the best iterate is returned).
    Atoms that no column uses, and the second of two equal ones, are replaced by the worst represented column.

    Attributes
    ----------
    n_iter : int
        Largest number of alternations; 60 in arXiv 2509.22075.
    init : {"svd", "columns"}
        First dictionary: the leading left singular vectors of the target, or random columns of it as in
        arXiv 2509.22075.  What is missing of the one is taken from the other.
    tolerance : float
        Stop when an alternation lowers the error by less than this part of it; 0 uses all alternations.
    coder : str or Coder
        ``omp``, ``spams``, ``sklearn``, ``threshold`` or a ``Coder``.
    """

    n_iter: int = 60
    init: Literal["svd", "columns"] = "svd"
    tolerance: float = 1e-4
    coder: str | Coder = "omp"

    def __post_init__(self) -> None:
        if self.n_iter < 1:
            raise UsageError(f"n_iter={self.n_iter}: expected at least 1")
        if self.init not in ("svd", "columns"):
            raise UsageError(f"init={self.init!r}: expected 'svd' or 'columns'")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance={self.tolerance}: expected 0 <= tolerance < 1")
        as_coder(self.coder)

    @abc.abstractmethod
    def _update(self, Y: Array, A: Array, S: Array, residual: Array) -> tuple[Array, Array, Array]:
        """Refit the dictionary, and the values of the coefficients if the method does so.

        Must keep the support of S and must not raise the error.  May overwrite ``residual`` = Y - A S alone.

        Returns
        -------
        A, S, residual : array
            Atoms of unit norm (or zero).
        """

    @final
    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        xp = namespace(target)
        coder = as_coder(self.coder)
        A = initial_dictionary(target, n_atoms, n_nonzero, self.init, seed)
        coding = coder.encode(A, target, n_nonzero)
        S, replaced, status = coding.coefficients, 0, Status.MAX_ITERATIONS
        residual = target - A @ S
        previous, best_error = float(xp.sum(squared_columns(residual))) ** 0.5, float("inf")
        best = A, S
        for iteration in range(1, self.n_iter + 1):
            A, S, residual = self._update(target, A, S, residual)
            energies = squared_columns(residual)
            error = float(xp.sum(energies)) ** 0.5
            if error < best_error:
                best, best_error = (A, S), error
            if error == 0 or (self.tolerance and previous - error <= self.tolerance * previous):
                status = Status.CONVERGED
                break
            if iteration == self.n_iter:
                break
            previous = error
            A, merged, count = _replace_atoms(target, A, S, energies)
            if merged is not S:
                S = merged
                residual = target - A @ S
                energies = squared_columns(residual)
            replaced += count
            coding = coder.encode(A, target, n_nonzero)
            fresh = target - A @ coding.coefficients
            better = (squared_columns(fresh) < energies)[None, :]
            S = xp.where(better, coding.coefficients, S)
            residual = xp.where(better, fresh, residual)
        statistics: dict[str, float | int | str] = {
            "iterations": iteration,
            "replaced_atoms": replaced,
            "dependent_columns": coding.dependent_columns,
        }
        return Solution(*best, status, statistics)


def initial_dictionary(Y: Array, n_atoms: int, n_nonzero: int, init: str, seed: int) -> Array:
    """Give ``n_atoms`` unit atoms: singular directions, or random non-zero columns, each completed by the other."""
    xp = namespace(Y)
    if init == "svd":
        return spectral_start(Y, n_atoms, n_nonzero)[0]
    columns = np.flatnonzero(convert(squared_columns(Y), "numpy") > 0)
    order = np.random.default_rng(seed).permutation(columns)[:n_atoms]
    parts = []
    if order.size:
        parts.append(unit_columns(xp.take(Y, xp.asarray(order, device=device(Y)), axis=1))[0])
    if order.size < n_atoms:
        parts.append(spectral_start(Y, n_atoms - order.size, n_nonzero)[0])
    return xp.concat(parts, axis=1)


def _replace_atoms(Y: Array, A: Array, S: Array, energies: Array) -> tuple[Array, Array, int]:
    """Put badly represented columns of Y in the place of idle and duplicate atoms.

    Parameters
    ----------
    energies : array, shape (n_columns,)
        Squared errors of the columns.

    Returns
    -------
    A : array
        With the replaced atoms.
    S : array
        The very same object unless atoms were merged.
    count : int
        Atoms replaced.
    """
    xp = namespace(Y)
    used = xp.any(S != 0, axis=1)
    overlaps = xp.triu(A.T @ A, k=1)
    same = (xp.abs(overlaps) > DUPLICATE) & used[:, None] & used[None, :]
    idle = [int(i) for i in np.flatnonzero(~convert(used, "numpy"))]
    if bool(xp.any(same)):
        S = xp.asarray(S, copy=True)
        gone: set[int] = set()
        for kept, second in np.argwhere(convert(same, "numpy")).tolist():
            if kept not in gone and second not in gone:
                sign = 1.0 if float(overlaps[kept, second]) > 0 else -1.0
                S[kept, :] = S[kept, :] + sign * S[second, :]
                S[second, :] = 0.0
                gone.add(second)
        idle = sorted(idle + list(gone))
    if not idle:
        return A, S, 0
    # Columns that are exact up to rounding have nothing to teach.
    noise = (64 * float(xp.finfo(Y.dtype).eps)) ** 2
    errors, sizes = convert(energies, "numpy"), convert(squared_columns(Y), "numpy")
    worst = [int(j) for j in np.argsort(-errors, kind="stable") if errors[j] > noise * sizes[j]][: len(idle)]
    if worst:
        fresh = unit_columns(xp.take(Y, xp.asarray(worst, device=device(Y)), axis=1))[0]
        A = xp.asarray(A, copy=True)
        for position, i in enumerate(idle[: len(worst)]):
            A[:, i] = fresh[:, position]
    return A, S, len(worst)
