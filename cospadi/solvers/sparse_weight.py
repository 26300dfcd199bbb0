"""Sparse weights: the special case in which the dictionary is the identity and takes no bytes.

With D = I the whitened dictionary is the fixed L^T, and all bytes are left for the coefficients:

    min tr((W - S)^T G (W - S) F)   over S with a given number of non-zeros,

layer-wise pruning with a correction of what remains.  The matrix being fixed, its eigenvectors are found once, and each
iteration of the alternating direction method of multipliers costs two products (Boyd et al. 2011; for pruning Meng,
Behdin, Wang, Mazumder 2024, arXiv 2406.07831; Frantar, Alistarh 2023, arXiv 2301.00774, remove entries greedily).  The
non-zeros are spread over the columns by what their errors cost.
"""

import numpy as np

from cospadi.arrays import Array, eigh, library_of, namespace
from cospadi.solvers.conjugate_gradients import conjugate_gradients

_FIRST_PENALTY, _LAST_PENALTY = 0.05, 4.0
"""On the distance between the free and the sparse iterate, for a Gram with a unit diagonal: the supports settle while
it is small, and are final when it is large."""


def sparsify(
    W: Array,
    G: Array,
    n_nonzero: int,
    scales: Array | None = None,
    *,
    n_iter: int = 12,
    final_cg_steps: int = 5,
) -> Array:
    """Give S with at most ``n_nonzero`` non-zeros in all and a small tr((W - S)^T G (W - S) F).

    Parameters
    ----------
    W : array, shape (in_features, n_columns), floating
        Not modified.
    G : array, shape (in_features, in_features)
        Symmetric positive definite.
    n_nonzero : int
    scales : array, shape (n_columns,), optional
        Positive square roots of the diagonal of F.
    n_iter, final_cg_steps : int
        Iterations that find the support, and conjugate gradient steps on it at the end.

    Returns
    -------
    S : array, shape (in_features, n_columns)
        No worse than W cut to its largest entries, in units of what dropping one alone costs.
    """
    xp = namespace(W, G)
    roots = xp.sqrt(xp.linalg.diagonal(G))
    roots = xp.where(roots > 0, roots, xp.ones_like(roots))
    G = G / (roots[:, None] * roots[None, :])
    Y = W * roots[:, None]
    if scales is not None:
        Y = Y * scales[None, :]
    S = keep_largest(Y, n_nonzero)
    residual = G @ (Y - S)
    if n_iter > 0:
        found = _split(Y, G, S, n_nonzero, n_iter)
        image = G @ (Y - found)
        if float(xp.sum((Y - found) * image)) <= float(xp.sum((Y - S) * residual)):
            S, residual = found, image
    refined = conjugate_gradients(G, residual, S, final_cg_steps)
    E, F = Y - refined, Y - S
    better = xp.sum(E * (G @ E), axis=0) <= xp.sum(F * residual, axis=0)
    S = xp.where(better[None, :], refined, S) / roots[:, None]
    return S if scales is None else S / scales[None, :]


def _split(Y: Array, G: Array, S: Array, n_nonzero: int, n_iter: int) -> Array:
    """Split the problem into a least squares without zeros and a threshold, which their multipliers bring together."""
    xp = namespace(Y, G)
    values, vectors = eigh(xp.astype(G, xp.float64))
    values = xp.astype(xp.where(values > 0, values, xp.zeros_like(values)), Y.dtype)[:, None]
    vectors = xp.astype(vectors, Y.dtype)
    target = values * (vectors.T @ Y)
    multipliers, penalty = xp.zeros_like(Y), _FIRST_PENALTY
    growth = (_LAST_PENALTY / _FIRST_PENALTY) ** (1 / n_iter)
    for _ in range(n_iter):
        free = vectors @ ((target + penalty * (vectors.T @ (S - multipliers))) / (values + penalty))
        S = keep_largest(free + multipliers, n_nonzero)
        # In units of the weight, so that the multipliers shrink as the penalty grows.
        multipliers = (multipliers + free - S) / growth
        penalty *= growth
    return S


def keep_largest(V: Array, n_nonzero: int) -> Array:
    """Keep the ``n_nonzero`` largest magnitudes of a whole matrix (the first ones among equals) and zero the rest."""
    xp = namespace(V)
    size = V.shape[0] * V.shape[1]
    if n_nonzero >= size:
        return V
    if n_nonzero <= 0:
        return xp.zeros_like(V)
    magnitudes = xp.reshape(xp.abs(V), (-1,))
    if library_of(V) == "numpy":
        smallest_kept = np.partition(magnitudes, size - n_nonzero)[size - n_nonzero]
    else:
        smallest_kept = xp.sort(magnitudes)[size - n_nonzero]
    keep = magnitudes >= smallest_kept
    if int(xp.count_nonzero(keep)) > n_nonzero:
        above = magnitudes > smallest_kept
        equal = keep & ~above
        room = n_nonzero - int(xp.count_nonzero(above))
        keep = above | (equal & (xp.cumulative_sum(xp.astype(equal, xp.int64)) <= room))
    return V * xp.reshape(xp.astype(keep, V.dtype), V.shape)
