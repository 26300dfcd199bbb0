"""Orthonormal dictionaries: coding is a threshold and the refit a Procrustes problem."""

from dataclasses import dataclass
from typing import final

from cospadi.arrays import Array
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.updates import hard_threshold, leading_left_singular_vectors, polar_factor


@final
@dataclass(frozen=True, kw_only=True)
class Orthogonal(Solver):
    """min ||Y - A S||^2 over A with A^T A = I, as COMPOT (arXiv 2602.15200) solves it.

    In turns S = the largest entries of A^T Y, which is exact for orthonormal A, and A = the polar factor of Y S^T.
    Starts from the leading left singular vectors.  Neither step can raise the error.

    Attributes
    ----------
    n_iter : int
        Number of alternations.
    """

    n_iter: int = 20

    def __post_init__(self) -> None:
        if self.n_iter < 0:
            raise UsageError(f"n_iter={self.n_iter}: expected 0 or more")

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        if n_atoms > target.shape[0]:
            raise UsageError(
                f"orthogonal: {n_atoms} atoms cannot be orthonormal in {target.shape[0]} dimensions; "
                "choose another solver (htp) or a larger ratio"
            )
        A, S = alternate(target, n_atoms, n_nonzero, self.n_iter)
        return Solution(A, S, Status.MAX_ITERATIONS, {"iterations": self.n_iter})


def alternate(Y: Array, n_atoms: int, n_nonzero: int, n_iter: int) -> tuple[Array, Array]:
    """Give an orthonormal dictionary and its coefficients after ``n_iter`` alternations."""
    A = leading_left_singular_vectors(Y, n_atoms)
    S = hard_threshold(A.T @ Y, n_nonzero)
    for _ in range(n_iter):
        A = polar_factor(Y @ S.T)
        S = hard_threshold(A.T @ Y, n_nonzero)
    return A, S
