"""The slow, trusted reference: scikit-learn's pursuit and LAPACK's least squares in float64."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from cospadi.arrays import Array
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.coders import SklearnOMP


@final
@dataclass(frozen=True, kw_only=True)
class Sklearn(Solver):
    """min ||Y - A S||^2 by turns over ``orthogonal_mp_gram`` and ``lstsq``, sharing no numerical code with the others.

    Starts from the singular vectors of ``numpy.linalg.svd`` and, where these are too few, random directions.  Gives the
    best iterate.  For checks on small problems: a column takes thousands of times longer than elsewhere.

    Attributes
    ----------
    n_iter : int
        Number of alternations.
    """

    library: ClassVar[str | None] = "numpy"
    n_iter: int = 5

    def __post_init__(self) -> None:
        if self.n_iter < 1:
            raise UsageError(f"n_iter={self.n_iter}: expected at least 1")

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        Y = target.astype(np.float64)
        d = Y.shape[0]
        A = np.linalg.svd(Y)[0][:, :n_atoms]
        if n_atoms > d:
            A = np.hstack([A, np.random.default_rng(seed).standard_normal((d, n_atoms - d))])
            A /= np.linalg.norm(A, axis=0)
        best, best_error, dependent = (A, np.zeros((n_atoms, Y.shape[1]))), float("inf"), 0
        for _ in range(self.n_iter):
            coding = SklearnOMP().encode(A, Y, n_nonzero)
            S, dependent = coding.coefficients, coding.dependent_columns
            used = np.any(S != 0, axis=1)
            A = A.copy()
            A[:, used] = np.linalg.lstsq(S[used].T, Y.T, rcond=None)[0].T
            sizes = np.linalg.norm(A, axis=0)
            sizes[sizes == 0] = 1
            A, S = A / sizes, S * sizes[:, None]
            error = float(np.linalg.norm(Y - A @ S))
            if error < best_error:
                best, best_error = (A, S), error
        statistics: dict[str, float | int | str] = {"iterations": self.n_iter, "dependent_columns": dependent}
        return Solution(best[0], best[1], Status.MAX_ITERATIONS, statistics)
