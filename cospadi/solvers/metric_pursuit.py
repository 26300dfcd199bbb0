"""Hard thresholding pursuit when the errors of different columns are correlated: a metric on both sides.

The whitened problem has a metric on the dictionary's side only.  Factoring W^T instead of W puts the inputs' Gram on
the side of the sparse factor, where it couples the columns:

    min tr((Y - A S) M (Y - A S)^T)   for a symmetric positive definite M, shape (n_columns, n_columns).

The sparse factor cannot be whitened without losing its zeros, but the gradient and the conjugate gradient step only
gain one multiplication by M.  Written once against the array API; letters as in ``base.py``.
"""

from cospadi.arrays import Array, eigh, namespace
from cospadi.solvers.updates import hard_threshold, solve_atoms, unit_columns


def pursue_in_metric(
    Y: Array,
    M: Array,
    n_atoms: int,
    n_nonzero: int,
    n_iter: int,
    cg_steps: int,
    final_cg_steps: int,
    relaxation: float = 1.8,
) -> tuple[Array, Array]:
    """Minimise tr((Y - A S) M (Y - A S)^T) over A and column-sparse S.

    Parameters
    ----------
    Y : array, shape (d, n_columns)
        Not modified.
    M : array, shape (n_columns, n_columns)
        Symmetric positive semidefinite with a unit diagonal, so that magnitudes in different columns compare.
    n_atoms, n_nonzero : int
        Sizes; ``n_atoms`` at most d.
    n_iter, cg_steps, final_cg_steps : int
        As for ``HTP``.
    relaxation : float
        As for ``HTP``; here the double is taken, because one length for all columns is set by the stiffest of them.

    Returns
    -------
    A : array, shape (d, n_atoms)
        Atoms of unit norm (or zero).
    S : array, shape (n_atoms, n_columns)
        At most ``n_nonzero`` non-zeros per column.
    """
    xp = namespace(Y)
    YM = Y @ M
    total = float(xp.sum(YM * Y))
    # The directions that keep most of the metric's energy, and the largest correlations with them.
    _, vectors = eigh(xp.astype(YM @ Y.T, xp.float64))
    A = xp.astype(xp.flip(vectors, axis=1)[:, :n_atoms], Y.dtype)
    S = hard_threshold(A.T @ Y, n_nonzero)
    SM = S @ M  # the one product of full size that each new S costs
    best, best_error = (A, S, SM), float("inf")
    # What rounding leaves of the energy of a row that the metric does not see, over its squared norm.
    noise = 8 * float(xp.finfo(Y.dtype).eps) * float(xp.sum(M * M)) ** 0.5
    for iteration in range(n_iter + 1):
        gram = _seen(SM @ S.T, noise * xp.sum(S * S, axis=1))
        A, sizes = unit_columns(solve_atoms(gram, S @ YM.T, A))
        S, SM = S * sizes[:, None], SM * sizes[:, None]
        G, B = A.T @ A, A.T @ YM
        C = B - G @ SM
        error = total - _gain(S, B, C)
        if error < best_error:
            best, best_error = (A, S, SM), error
        if iteration == n_iter:
            break
        # One step length for all columns: the metric couples them.
        length = 2 * relaxation * _length(float(xp.sum(C * C)), C, G @ (C @ M))
        S = hard_threshold(S + length * C, n_nonzero)
        S, SM = conjugate_gradients_in_metric(G, M, B, S, S @ M, cg_steps)
    A, S, SM = best
    G, B = A.T @ A, A.T @ YM
    refined, image = conjugate_gradients_in_metric(G, M, B, S, SM, final_cg_steps)
    return (A, refined) if _gain(refined, B, B - G @ image) >= _gain(S, B, B - G @ SM) else (A, S)


def conjugate_gradients_in_metric(G: Array, M: Array, B: Array, S: Array, SM: Array, steps: int) -> tuple[Array, Array]:
    """Approach min tr((Y - A S) M (Y - A S)^T) over the values of S on its support (Hestenes, Stiefel 1952).

    Parameters
    ----------
    G : array, shape (n_atoms, n_atoms)
        A^T A.
    M : array, shape (n_columns, n_columns)
    B : array, shape (n_atoms, n_columns)
        A^T Y M.
    S, SM : array, shape (n_atoms, n_columns)
        S and S M.

    Returns
    -------
    S, SM : array
    """
    xp = namespace(G, S)
    mask = xp.astype(S != 0, S.dtype)
    residual = (B - G @ SM) * mask
    direction, energy = residual, float(xp.sum(residual * residual))
    for _ in range(steps):
        along = direction @ M
        image = (G @ along) * mask
        length = _length(energy, direction, image)
        if length == 0:
            break
        S, SM = S + length * direction, SM + length * along
        residual = residual - length * image
        previous, energy = energy, float(xp.sum(residual * residual))
        direction = residual + (energy / previous) * direction
    return S, SM


def _seen(gram: Array, noise: Array) -> Array:
    """Give S M S^T with zeros for rows of no more energy than noise: atoms for them would be noise, too."""
    xp = namespace(gram)
    seen = xp.astype(xp.linalg.diagonal(gram) > noise, gram.dtype)
    return gram * (seen[:, None] * seen[None, :])


def _gain(S: Array, B: Array, C: Array) -> float:
    """Give what S takes off the squared error of zero: <S, B> + <S, C>, without forming the residual."""
    xp = namespace(S)
    return float(xp.sum(S * B)) + float(xp.sum(S * C))


def _length(energy: float, direction: Array, image: Array) -> float:
    """Give energy / <direction, image>: the step to the minimum; zero where the curvature is that of rounding."""
    xp = namespace(direction)
    floor = 64 * float(xp.finfo(direction.dtype).eps) * float(xp.sum(direction * direction))
    curvature = float(xp.sum(direction * image))
    return energy / curvature if curvature > floor else 0.0
