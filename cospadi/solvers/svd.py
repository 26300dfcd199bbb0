"""Truncated SVD of the whitened target: the low-rank baseline, with dense coefficients."""

from dataclasses import dataclass
from typing import ClassVar, final

from cospadi.arrays import Array
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver
from cospadi.solvers.updates import leading_left_singular_vectors


@final
@dataclass(frozen=True, kw_only=True)
class SVD(Solver):
    """min ||Y - A S||^2 of rank ``n_atoms``: A = U, S = U^T Y = diag(sigma) V^T (SVD-LLM, arXiv 2403.07378).

    The best factorisation without sparsity (Eckart, Young 1936).
    """

    sparse: ClassVar[bool] = False

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        if n_atoms > min(target.shape):
            raise UsageError(
                f"svd: n_atoms={n_atoms} for a target of shape {tuple(target.shape)}: a rank is at most "
                f"{min(target.shape)}; choose a larger ratio or a sparse solver"
            )
        U = leading_left_singular_vectors(target, n_atoms)
        return Solution(U, U.T @ target)
