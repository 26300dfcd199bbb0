"""Learners that alternate between coding the columns and refitting the dictionary."""

import abc
import math
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
from array_api_compat import device

from cospadi.arrays import Array, convert, namespace
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.coders import Coder, Coding, as_coder
from cospadi.solvers.exchange import better_columns, exchange_atoms, polished, pursuit_pays
from cospadi.solvers.htp import HTP
from cospadi.solvers.updates import spectral_start, squared_columns, unit_columns

DUPLICATE = 0.9999
"""Two atoms are the same one when the magnitude of their inner product exceeds this."""
POLISH_ALTERNATIONS = 15
FIRST_TRIAL = 4
"""Alternation of the first trial of the pursuit, but for random columns: at the very first it wins and still loses."""
ADAPTION = 0.5
"""Change of the logarithm of the relaxation per unit of acceptance: more of it swings."""


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
    init : {"svd", "columns", "htp"}
        First dictionary: the leading left singular vectors of the target, or random columns of it as in
        arXiv 2509.22075 (what is missing of the one is taken from the other), or the dictionary and the support of
        hard thresholding pursuit.
    tolerance : float
        Stop when an alternation lowers the error by less than this part of it; 0 uses all alternations.
    coder : str or Coder
        ``omp``, ``gomp``, ``spams``, ``sklearn``, ``threshold`` or a ``Coder``.
    pursue_every : int or "auto"
        The coder codes from scratch in every n-th alternation, 1 for all of them as in the paper, 0 for the first code
        alone; the other alternations exchange atoms of the last support (see ``exchange_atoms``).  auto exchanges,
        tries both on 64 columns after 4, 8, 16, ... alternations (1, 2, 4, ... from random columns), and codes from
        scratch until the next trial where that was better.
    relaxation : float
        Length of the gradient step of an exchange, in units of the exact line search; of the first one if adapted.
    acceptance : float
        The relaxation grows where an exchange improves more than this part of the error's energy, and else shrinks: too
        short a step exchanges nothing, too long a one too much.  0 keeps it fixed.
    cg_steps : int
        Conjugate gradient steps of an exchange.
    polish : {"none", "cg", "htp"}
        What follows the last alternation: conjugate gradients on the support, or first 15 alternations of exchange and
        least-squares dictionary, i.e. hard thresholding pursuit.
    """

    n_iter: int = 60
    init: Literal["svd", "columns", "htp"] = "svd"
    tolerance: float = 1e-4
    coder: str | Coder = "omp"
    pursue_every: int | Literal["auto"] = 1
    relaxation: float = 1.6
    acceptance: float = 0.6
    cg_steps: int = 2
    polish: Literal["none", "cg", "htp"] = "none"

    def __post_init__(self) -> None:
        if self.n_iter < 1:
            raise UsageError(f"n_iter={self.n_iter}: expected at least 1")
        if self.init not in ("svd", "columns", "htp"):
            raise UsageError(f"init={self.init!r}: expected 'svd', 'columns' or 'htp'")
        if not 0 <= self.tolerance < 1:
            raise UsageError(f"tolerance={self.tolerance}: expected 0 <= tolerance < 1")
        if self.pursue_every != "auto" and self.pursue_every < 0:
            raise UsageError(f"pursue_every={self.pursue_every}: expected 0 or more, or auto")
        if not 0 < self.relaxation < math.inf:
            raise UsageError(f"relaxation={self.relaxation}: expected a positive number")
        if not 0 <= self.acceptance < 1:
            raise UsageError(f"acceptance={self.acceptance}: expected 0 <= acceptance < 1")
        if self.cg_steps < 0:
            raise UsageError(f"cg_steps={self.cg_steps}: expected 0 or more")
        if self.polish not in ("none", "cg", "htp"):
            raise UsageError(f"polish={self.polish!r}: expected 'none', 'cg' or 'htp'")
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
        pays, pursuits, relaxation = False, 0, self.relaxation
        first_trial = 1 if self.init == "columns" else FIRST_TRIAL
        if self.init == "htp":
            start = HTP()._factorize(target, n_atoms, n_nonzero, seed)
            A, coding = start.dictionary, Coding(start.coefficients)
        else:
            A = initial_dictionary(target, n_atoms, n_nonzero, self.init, seed)
            coding, pursuits = coder.encode(A, target, n_nonzero), 1
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
            if self.pursue_every == "auto":
                if iteration >= first_trial and iteration & (iteration - 1) == 0:
                    pays = pursuit_pays(target, A, S, residual, n_nonzero, coder, relaxation, self.cg_steps)
            else:
                pays = self.pursue_every > 0 and iteration % self.pursue_every == 0
            if pays:
                coding = coder.encode(A, target, n_nonzero)
                candidate, pursuits = coding.coefficients, pursuits + 1
            else:
                candidate = exchange_atoms(A, S, residual, n_nonzero, relaxation, self.cg_steps)
            S, residual, improved = better_columns(target, A, S, residual, energies, candidate)
            if self.acceptance and not pays:
                relaxation = min(max(relaxation * math.exp(ADAPTION * (improved - self.acceptance)), 0.5), 4.0)
        if self.polish != "none":
            alternations = POLISH_ALTERNATIONS if self.polish == "htp" else 0
            best = polished(target, *best, n_nonzero, alternations, self.cg_steps)
        statistics: dict[str, float | int | str] = {
            "iterations": iteration,
            "pursuits": pursuits,
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
