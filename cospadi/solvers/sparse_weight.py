"""Sparse weights: the special case in which the dictionary is the identity and takes no bytes.

With D = I the whitened dictionary is the fixed L^T, and all bytes are left for the coefficients:

    min tr((W - S)^T G (W - S) F)   over S with a given number of non-zeros,

layer-wise pruning with a correction of what remains (Frantar, Alistarh 2023, arXiv 2301.00774, solve it greedily).
Here by hard thresholding pursuit (Foucart 2011), with the non-zeros spread over the columns by what their errors cost.
"""

import numpy as np

from cospadi.arrays import Array, library_of, namespace
from cospadi.solvers.htp import column_steps, conjugate_gradients
from cospadi.solvers.updates import squared_columns


def sparse_weight(
    W: Array,
    G: Array,
    n_nonzero: int,
    scales: Array | None = None,
    *,
    n_iter: int = 8,
    cg_steps: int = 2,
    final_cg_steps: int = 15,
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
    n_iter, cg_steps, final_cg_steps : int
        Rounds of pursuit, and conjugate gradient steps in each of them and at the end.

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
    best, best_error = S, float("inf")
    for iteration in range(n_iter + 1):
        C = G @ (Y - S)
        error = float(xp.sum((Y - S) * C))
        if error < best_error:
            best, best_error = S, error
        if iteration == n_iter:
            break
        S = keep_largest(S + column_steps(squared_columns(C), C, G @ C)[None, :] * C, n_nonzero)
        S = conjugate_gradients(G, G @ (Y - S), S, cg_steps)
    refined = conjugate_gradients(G, G @ (Y - best), best, final_cg_steps)
    E, F = Y - refined, Y - best
    better = xp.sum(E * (G @ E), axis=0) <= xp.sum(F * (G @ F), axis=0)
    S = xp.where(better[None, :], refined, best) / roots[:, None]
    return S if scales is None else S / scales[None, :]


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
