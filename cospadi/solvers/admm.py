"""Dictionary learning by the alternating direction method of multipliers: slower than HTP, lower errors."""

from dataclasses import dataclass
from typing import final

from array_api_compat import device

from cospadi.arrays import Array, namespace
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.exchange import polished
from cospadi.solvers.htp import first_factors
from cospadi.solvers.updates import hard_threshold, least_squares_dictionary, squared_columns, unit_columns

_MOST_GROWTH = 10.0
"""Of an atom in one iteration, so that its multipliers are kept."""


@final
@dataclass(frozen=True, kw_only=True)
class ADMM(Solver):
    """min ||Y - A S||^2 with multipliers that bring dense and sparse coefficients together (Boyd et al. 2011).

    Each iteration: A by least squares on the sparse coefficients, its atoms scaled to unit norm; coefficients without
    zeros that fit Y and are held to the sparse ones by a penalty; the largest entries of each of their columns.  The
    penalty grows: while it is small the supports change freely, in the end they stand.  With a fixed dictionary this is
    how ALPS prunes weights (Meng, Behdin, Wang, Mazumder 2024, arXiv 2406.07831).  It ends with a last alternation of
    hard thresholding pursuit and conjugate gradients on the support.

    Attributes
    ----------
    n_iter : int
        Number of iterations.
    first_penalty, last_penalty : float
        The penalty's bounds, in units of the squared norm of an atom; it grows by a constant factor.
    cg_steps : int
        Conjugate gradient steps in the alternation that ends the solve.
    """

    n_iter: int = 40
    first_penalty: float = 0.05
    last_penalty: float = 5.0
    cg_steps: int = 10

    def __post_init__(self) -> None:
        if min(self.n_iter, self.cg_steps) < 0:
            raise UsageError(f"n_iter={self.n_iter}, cg_steps={self.cg_steps}: expected 0 or more")
        if not 0 < self.first_penalty <= self.last_penalty < float("inf"):
            raise UsageError(
                f"first_penalty={self.first_penalty}, last_penalty={self.last_penalty}: expected 0 < first <= last"
            )

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        start = first_factors(target, n_atoms, n_nonzero, seed)
        # Penalties that do not suit the problem leave the start behind; nothing may end above it.
        ends = [
            polished(target, *one, n_nonzero, 1, self.cg_steps)
            for one in (start, self._split(target, *start, n_nonzero))
        ]
        best = min(ends, key=lambda end: _error(target, *end))
        return Solution(*best, Status.MAX_ITERATIONS, {"iterations": self.n_iter})

    def _split(self, Y: Array, A: Array, S: Array, n_nonzero: int) -> tuple[Array, Array]:
        xp = namespace(Y)
        identity = xp.eye(A.shape[1], dtype=xp.float64, device=device(Y))
        growth = (self.last_penalty / self.first_penalty) ** (1 / max(1, self.n_iter - 1))
        multipliers, penalty = xp.zeros_like(S), self.first_penalty
        for _ in range(self.n_iter):
            A, sizes = unit_columns(least_squares_dictionary(Y, S, A))
            # Next to nothing was coded with an atom that grows much; its multipliers would grow with it, without end.
            known = xp.astype(sizes < _MOST_GROWTH, Y.dtype)
            S, multipliers = S * sizes[:, None], multipliers * (known * sizes)[:, None]
            held = xp.astype(A.T @ A, xp.float64) + penalty * identity
            free = xp.astype(xp.linalg.inv(held), Y.dtype) @ (A.T @ Y + penalty * (S - multipliers))
            S = hard_threshold(free + multipliers, n_nonzero)
            # In units of the coefficients, so that the multipliers shrink as the penalty grows.
            multipliers = (multipliers + free - S) / growth
            penalty *= growth
        return A, S


def _error(Y: Array, A: Array, S: Array) -> float:
    return float(namespace(Y).sum(squared_columns(Y - A @ S)))
