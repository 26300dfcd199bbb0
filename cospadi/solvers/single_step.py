"""One pass without iterations: singular directions, the largest coefficients, a least-squares dictionary."""

from dataclasses import dataclass
from typing import final

from cospadi.arrays import Array
from cospadi.solvers.base import Solution, Solver
from cospadi.solvers.updates import least_squares_dictionary, spectral_start


@final
@dataclass(frozen=True, kw_only=True)
class SingleStep(Solver):
    """The closed form of ROCKET (arXiv 2602.11008): S = the largest entries of U^T Y, then A = Y S^T (S S^T)^-1.

    ROCKET weighs the entries with the whitening factor, which a solver does not see; here magnitude decides alone.
    More atoms than directions: each further one starts as a badly represented column (see ``spectral_start``).
    """

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        A, S = spectral_start(target, n_atoms, n_nonzero)
        return Solution(least_squares_dictionary(target, S, A), S)
