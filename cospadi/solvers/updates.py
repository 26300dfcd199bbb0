"""The closed-form pieces that the solvers are made of, written once against the array API.

Letters as in ``base.py``: target ``Y`` (in_features, n_columns), dictionary ``A`` (in_features, n_atoms) with atoms as
columns, coefficients ``S`` (n_atoms, n_columns).  Nothing here modifies its arguments, and nothing depends on the scale
of the target: every threshold is relative.
"""

import numpy as np
from array_api_compat import device

from cospadi.arrays import Array, eigh, library_of, namespace

_COLUMNS = 1024
"""Columns that are thresholded at a time."""


def squared_columns(V: Array) -> Array:
    """Give the squared Euclidean norm of each column, shape (n_columns,)."""
    return namespace(V).sum(V * V, axis=0)


def unit_columns(V: Array) -> tuple[Array, Array]:
    """Scale the columns to unit norm; zero columns stay zero.

    Returns
    -------
    unit : array, shape of V
    norms : array, shape (n_columns,)
    """
    xp = namespace(V)
    # Dividing by the largest entry first keeps the squares in the range of float32.
    largest = xp.max(xp.abs(V), axis=0)
    largest = xp.where(largest > 0, largest, xp.ones_like(largest))
    V = V / largest[None, :]
    norms = xp.sqrt(squared_columns(V))
    safe = xp.where(norms > 0, norms, xp.ones_like(norms))
    return V / safe[None, :], norms * largest


def hard_threshold(V: Array, n_nonzero: int) -> Array:
    """Keep the ``n_nonzero`` largest magnitudes of each column (the first ones among equals) and zero the rest."""
    xp = namespace(V)
    n_rows = V.shape[0]
    if n_nonzero >= n_rows:
        return V
    if n_nonzero == 0:
        return xp.zeros_like(V)
    if library_of(V) == "numpy":  # in pieces: what is computed on the way takes several times the memory of V
        kept = np.empty_like(V)
        for start in range(0, V.shape[1], _COLUMNS):
            kept[:, start : start + _COLUMNS] = _threshold(V[:, start : start + _COLUMNS], n_nonzero)
        return kept
    return _threshold(V, n_nonzero)


def _threshold(V: Array, n_nonzero: int) -> Array:
    xp = namespace(V)
    magnitudes, place = xp.abs(V), V.shape[0] - n_nonzero
    if library_of(V) == "numpy":
        rows = np.array(magnitudes.T, order="C")  # always a copy: it is partitioned in place
        rows.partition(place, axis=1)
        smallest_kept = rows[:, place].copy()  # contiguous, for the comparisons that follow
    else:
        smallest_kept = xp.sort(magnitudes, axis=0)[place, :]
    keep = magnitudes >= smallest_kept[None, :]
    if int(xp.count_nonzero(keep)) > n_nonzero * V.shape[1]:
        above = magnitudes > smallest_kept[None, :]
        equal = keep & ~above
        room = n_nonzero - xp.count_nonzero(above, axis=0)
        keep = above | (equal & (xp.cumulative_sum(xp.astype(equal, xp.int64), axis=0) <= room[None, :]))
    return V * xp.astype(keep, V.dtype)


def leading_left_singular_vectors(Y: Array, n_vectors: int) -> Array:
    """Give the ``n_vectors`` orthonormal directions of most energy: min ||Y - U U^T Y||, in falling order.

    From the eigenvectors of the smaller Gram of Y in float64, in which squaring costs no digit that float32 has.

    Returns
    -------
    U : array, shape (in_features, n_vectors), dtype of Y
        ``n_vectors`` must not exceed in_features; directions beyond the rank of Y complete the orthonormal set.
    """
    xp = namespace(Y)
    d, n = Y.shape
    largest = max(float(xp.max(Y)), -float(xp.min(Y)))
    exact = xp.astype(Y, xp.float64)
    if largest > 0:
        exact /= largest
    if d <= n:
        vectors = xp.flip(eigh(exact @ exact.T)[1], axis=1)[:, :n_vectors]
    else:
        right = xp.flip(eigh(exact.T @ exact)[1], axis=1)[:, : min(n_vectors, n)]
        mode = "reduced" if n_vectors <= n else "complete"
        exact = exact @ right
        vectors = xp.linalg.qr(exact, mode=mode)[0][:, :n_vectors]
    return _contiguous(xp.astype(vectors, Y.dtype))


def spectral_start(Y: Array, n_atoms: int, n_nonzero: int) -> tuple[Array, Array]:
    """Give a dictionary and coefficients in closed form: singular directions and the largest correlations with them.

    When there are more atoms than directions, each further atom is a column of Y, the worst represented first, and
    codes that column alone.

    Returns
    -------
    A : array, shape (in_features, n_atoms)
        Atoms of unit norm.
    S : array, shape (n_atoms, n_columns)
        At most ``n_nonzero`` non-zeros per column.
    """
    xp = namespace(Y)
    d, n = Y.shape
    A = leading_left_singular_vectors(Y, min(n_atoms, d))
    S = hard_threshold(A.T @ Y, n_nonzero)
    if n_atoms <= d:
        return A, S
    spare = n_atoms - d
    residual = Y - A @ S
    worst = xp.argsort(squared_columns(residual), descending=True, stable=True)[: min(spare, n)]
    extra, norms = unit_columns(xp.take(Y, worst, axis=1))
    if n_nonzero:
        own = xp.astype(xp.arange(n, device=device(worst))[None, :] == worst[:, None], Y.dtype)
        alone = xp.sum(own, axis=0) > 0
        S = xp.where(alone[None, :], xp.zeros_like(S), S)
        below = own * norms[:, None]
    else:
        below = xp.zeros((worst.shape[0], n), dtype=Y.dtype, device=device(Y))
    A, S = xp.concat([A, extra], axis=1), xp.concat([S, below], axis=0)
    while A.shape[1] < n_atoms:  # more atoms than directions and columns together: every column is exact already
        more = A[:, : min(d, n_atoms - A.shape[1])]
        A, S = xp.concat([A, more], axis=1), xp.concat([S, xp.zeros_like(S)[: more.shape[1], :]], axis=0)
    return A, S


def least_squares_dictionary(Y: Array, S: Array, previous: Array) -> Array:
    """Solve min over A of ||Y - A S||^2: A = Y S^T (S S^T + ridge)^-1 (Engan, Aase, Husoy 1999).

    Parameters
    ----------
    Y : array, shape (in_features, n_columns)
    S : array, shape (n_atoms, n_columns)
    previous : array, shape (in_features, n_atoms)
        Atoms that no column uses keep this direction.

    Returns
    -------
    A : array, shape (in_features, n_atoms)
    """
    return solve_atoms(S @ S.T, S @ Y.T, previous)


def solve_atoms(gram: Array, right: Array, previous: Array) -> Array:
    """Solve A gram = right^T with a ridge.

    The equations are scaled to a unit diagonal first, so that the tiny ridge (64 units of rounding) weighs on all atoms
    alike and a long decay of their energies costs no digits.

    Parameters
    ----------
    gram : array, shape (n_atoms, n_atoms)
        Symmetric positive semidefinite, such as S S^T.
    right : array, shape (n_atoms, in_features)
        Such as S Y^T.
    previous : array, shape (in_features, n_atoms)
        Atoms of zero energy keep this direction.
    """
    xp = namespace(gram)
    energies = xp.linalg.diagonal(gram)
    used = energies > 0
    sizes = xp.sqrt(xp.where(used, energies, xp.ones_like(energies)))
    gram = gram / sizes[:, None]
    gram /= sizes[None, :]
    # The diagonal is one, or zero for unused atoms, whose equations become x = 0.
    ridge = xp.eye(gram.shape[0], dtype=gram.dtype, device=device(gram))
    ridge *= xp.where(used, 0.0 * sizes, xp.ones_like(sizes)) + 64 * float(xp.finfo(gram.dtype).eps)
    gram += ridge
    del ridge
    right = xp.linalg.solve(gram, right / sizes[:, None])
    right /= sizes[:, None]
    return xp.where(used[None, :], right.T, previous)


def polar_factor(M: Array) -> Array:
    """Give the matrix with orthonormal columns that is nearest to M (Procrustes): U V^T of its SVD; M is not wide."""
    left, _, right = namespace(M).linalg.svd(M, full_matrices=False)
    return left @ right


def _contiguous(array: Array) -> Array:
    if library_of(array) == "numpy":
        return np.ascontiguousarray(array)
    return array.contiguous() if library_of(array) == "torch" else array


def quotient(a: Array, b: Array) -> Array:
    """Divide, giving zero where the denominator is not positive: columns that are solved already."""
    xp = namespace(a, b)
    positive = b > 0
    return xp.where(positive, a / xp.where(positive, b, xp.ones_like(b)), xp.zeros_like(a))
