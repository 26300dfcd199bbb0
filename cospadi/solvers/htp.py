"""Hard thresholding pursuit over all columns at once: the default learner."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np
from array_api_compat import device

from cospadi.arrays import Array, namespace
from cospadi.errors import UsageError
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.coders import BatchOMP
from cospadi.solvers.conjugate_gradients import column_steps, conjugate_gradients
from cospadi.solvers.metric_pursuit import pursue_in_metric
from cospadi.solvers.orthogonal import alternate
from cospadi.solvers.updates import (
    hard_threshold,
    leading_left_singular_vectors,
    least_squares_dictionary,
    spectral_start,
    squared_columns,
    unit_columns,
)

START_ALTERNATIONS = 5


@final
@dataclass(frozen=True, kw_only=True)
class HTP(Solver):
    """min ||Y - A S||^2 by hard thresholding pursuit (Foucart 2011) with a least-squares dictionary, after GeoPair.

    Each iteration: A by least squares, its atoms scaled to unit norm; a gradient step on S with the exact step length
    of each column; the largest entries of each column; a few conjugate gradient steps on that support.  It ends with a
    last dictionary and more conjugate gradient steps from the best iterate.  All work is matrix products of full size,
    where matching pursuit goes column by column.

    The step is longer than the one that would be exact without the threshold: the support is then exchanged faster, and
    the values are put right on it by what follows (over-relaxation).

    Attributes
    ----------
    n_iter : int
        Number of iterations.
    cg_steps, final_cg_steps : int
        Conjugate gradient steps in each iteration and at the end.
    start : {"single-step", "orthogonal"}
        First support: from singular directions, or from five alternations with an orthonormal dictionary.  More atoms
        than dimensions start from matching pursuit instead (see ``overcomplete_start``).
    relaxation : float
        Length of the gradient steps in units of the exact one.
    """

    n_iter: int = 15
    cg_steps: int = 1
    final_cg_steps: int = 5
    start: Literal["single-step", "orthogonal"] = "orthogonal"
    relaxation: float = 1.8

    takes_column_metric: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.n_iter, self.cg_steps, self.final_cg_steps) < 0:
            raise UsageError(
                f"n_iter={self.n_iter}, cg_steps={self.cg_steps}, final_cg_steps={self.final_cg_steps}: "
                "expected 0 or more"
            )
        if self.start not in ("single-step", "orthogonal"):
            raise UsageError(f"start={self.start!r}: expected 'single-step' or 'orthogonal'")
        if not 0 < self.relaxation <= 4:
            raise UsageError(f"relaxation={self.relaxation}: expected more than 0 and at most 4")

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        Y = target
        A, S = first_factors(Y, n_atoms, n_nonzero, seed, self.start)
        best, best_error = (A, S), float("inf")
        for iteration in range(self.n_iter + 1):
            A, sizes = unit_columns(least_squares_dictionary(Y, S, A))
            S = S * sizes[:, None]
            G, B = A.T @ A, A.T @ Y
            C = B - G @ S
            # ||Y - A S||^2 = ||Y||^2 - <S, B> - <S, C>, without forming the residual
            error = -float(_inner(S, B)) - float(_inner(S, C))
            if error < best_error:
                best, best_error = (A, S), error
            if iteration == self.n_iter:
                break
            lengths = self.relaxation * column_steps(squared_columns(C), C, G @ C)
            S = hard_threshold(S + lengths[None, :] * C, n_nonzero)
            S = conjugate_gradients(G, B - G @ S, S, self.cg_steps)
        A, S = best
        G = A.T @ A
        refined = conjugate_gradients(G, A.T @ Y - G @ S, S, self.final_cg_steps)
        # Columns that are solved up to rounding have nothing to gain, and noise must not spoil them.
        better = squared_columns(Y - A @ refined) <= squared_columns(Y - A @ S)
        S = namespace(Y).where(better[None, :], refined, S)
        return Solution(A, S, Status.MAX_ITERATIONS, {"iterations": self.n_iter})

    def _factorize_in_metric(self, target: Array, metric: Array, n_atoms: int, n_nonzero: int) -> Solution:
        if n_atoms > target.shape[0]:
            raise UsageError(
                f"htp: {n_atoms} atoms in {target.shape[0]} dimensions: with a column metric at most as many"
            )
        steps = self.n_iter, self.cg_steps, self.final_cg_steps
        A, S = pursue_in_metric(target, metric, n_atoms, n_nonzero, *steps, relaxation=self.relaxation)
        return Solution(A, S, Status.MAX_ITERATIONS, {"iterations": self.n_iter})


def first_factors(
    Y: Array, n_atoms: int, n_nonzero: int, seed: int, start: Literal["single-step", "orthogonal"] = "orthogonal"
) -> tuple[Array, Array]:
    """Give a dictionary and coefficients to start from; see ``HTP``.

    Returns
    -------
    A : array, shape (in_features, n_atoms)
    S : array, shape (n_atoms, n_columns)
    """
    if n_atoms > Y.shape[0]:
        return overcomplete_start(Y, n_atoms, n_nonzero, seed)
    if start == "orthogonal":
        return alternate(Y, n_atoms, n_nonzero, START_ALTERNATIONS)
    return spectral_start(Y, n_atoms, n_nonzero)


def overcomplete_start(Y: Array, n_atoms: int, n_nonzero: int, seed: int) -> tuple[Array, Array]:
    """Give singular directions completed by random ones in the range of Y, and coefficients by matching pursuit.

    With more atoms than dimensions the largest correlations are a poor code, and columns of Y poor extra atoms.

    Returns
    -------
    A : array, shape (in_features, n_atoms)
    S : array, shape (n_atoms, n_columns)
    """
    xp = namespace(Y)
    d = Y.shape[0]
    U = leading_left_singular_vectors(Y, d)
    sizes = xp.sum((U.T @ Y) ** 2, axis=1)
    inside = xp.astype(sizes > (64 * xp.finfo(Y.dtype).eps) ** 2 * xp.max(sizes), Y.dtype)
    noise = np.random.default_rng(seed).standard_normal((d, n_atoms - d))
    noise = xp.asarray(noise, dtype=Y.dtype, device=device(Y))
    A = xp.concat([U, unit_columns(U @ (inside[:, None] * (U.T @ noise)))[0]], axis=1)
    return A, BatchOMP().encode(A, Y, n_nonzero).coefficients


def _inner(U: Array, V: Array) -> Array:
    return namespace(U).sum(U * V)
