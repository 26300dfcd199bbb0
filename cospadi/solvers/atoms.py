"""Refitting the atoms of K-SVD on fixed supports: one after the other, or in blocks of matrix products.

Letters as in ``updates.py``; R = Y - A S.  Every function keeps the support of S, gives atoms of unit norm and new
arrays, and cannot raise the error beyond rounding.
"""

import math
from collections.abc import Callable

from cospadi.arrays import Array, namespace
from cospadi.solvers.updates import quotient, squared_columns, unit_columns


def update_atoms_arrays(A: Array, S: Array, residual: Array, power_iterations: int) -> tuple[Array, Array, Array]:
    """Do what ``kernels.update_atoms`` does, with masked products over all columns, atom after atom.

    Parameters
    ----------
    A : array, shape (in_features, n_atoms)
    S : array, shape (n_atoms, n_columns)
    residual : array, shape (in_features, n_columns)
    power_iterations : int
        Power steps per atom, from the current atom.

    Returns
    -------
    A, S, residual : array
        New arrays.
    """
    xp = namespace(A, S, residual)
    A, S = xp.asarray(A, copy=True), xp.asarray(S, copy=True)
    for i in range(A.shape[1]):
        old, s = A[:, i], S[i, :]
        mask = xp.astype(s != 0, s.dtype)
        atom = xp.asarray(old, copy=True)
        for _ in range(power_iterations):
            v = mask * (atom @ residual + s * xp.vecdot(old, atom))
            direction, size = unit_columns((residual @ v + old * xp.vecdot(s, v))[:, None])
            atom = xp.where(size > 0, direction[:, 0], atom)
        v = mask * (atom @ residual + s * xp.vecdot(old, atom))
        residual = residual + old[:, None] * s[None, :] - atom[:, None] * v[None, :]
        A[:, i] = atom
        S[i, :] = v
    return A, S, residual


def update_blocks_in_sequence(
    A: Array, S: Array, residual: Array, block: int, sweeps: int
) -> tuple[Array, Array, Array]:
    """Refit the atoms one after the other, touching the residual only once per block (Rubinstein et al. 2008).

    Atom i takes one power step from its coefficients, with E = R + a_i s_i on the columns that use it:
    a_i <- E s_i / |E s_i|, then s_i <- E^T a_i.  The result does not depend on the block: what the atoms before i have
    changed is a sum of rank-one terms.  With P = R_0 S_b^T, X = P^T R_0, Z = A_b^T R_0 and H = S_b S_b^T of the block's
    start, and the new u, v and w = R_0^T u,

        E s_i = P_i + sum_{j <= i} H_ij a_j - sum_{j < i} <v_j, s_i> u_j,
        R_0^T E s_i = X_i + sum_{j <= i} H_ij Z_j - sum_{j < i} <v_j, s_i> w_j,
        E^T u = R_0^T u + sum_{j <= i} <a_j, u> s_j - sum_{j < i} <u_j, u> v_j   (on the support).

    Parameters
    ----------
    A, S, residual : array
        As for ``update_atoms_arrays``.
    block : int
        Atoms per block.
    sweeps : int
        Times that each block is refitted.

    Returns
    -------
    A, S, residual : array
        New arrays.
    """
    return _over_blocks(_block_in_sequence, A, S, residual, block, sweeps)


def _block_in_sequence(A: Array, S: Array, residual: Array) -> tuple[Array, Array]:
    xp = namespace(A, S, residual)
    n_atoms = A.shape[1]
    masks = xp.astype(S != 0, S.dtype)
    P, H = residual @ S.T, S @ S.T
    products = xp.concat([P, A], axis=1).T @ residual
    X, Z = products[:n_atoms, :], products[n_atoms:, :]
    U, V, W = xp.zeros_like(A), xp.zeros_like(S), xp.zeros_like(S)
    for i in range(n_atoms):
        until = i + 1
        back = V[:i, :] @ S[i, :]
        direction = P[:, i] + A[:, :until] @ H[:until, i] - U[:, :i] @ back
        along = X[i, :] + H[:until, i] @ Z[:until, :] - back @ W[:i, :]
        # The largest entry first: squares of small numbers leave the range of float32.
        largest = xp.max(xp.abs(direction))
        moves = largest > 0
        largest = xp.where(moves, largest, xp.ones_like(largest))
        direction = direction / largest
        size = xp.sqrt(xp.vecdot(direction, direction))
        size = xp.where(moves, size, xp.ones_like(size))
        # Unused atoms, and those that nothing is left for, stay where they are.
        atom = xp.where(moves, direction / size, A[:, i])
        along = xp.where(moves, along / largest / size, Z[i, :])
        U[:, i], W[i, :] = atom, along
        kept = (atom @ A[:, :until]) @ S[:until, :] - (atom @ U[:, :i]) @ V[:i, :]
        V[i, :] = masks[i, :] * (along + kept)
    return U, V


def update_blocks_jointly(A: Array, S: Array, residual: Array, block: int, sweeps: int) -> tuple[Array, Array, Array]:
    """Refit all atoms of a block at once, then their coefficients, each with the exact step length.

    Every atom of the block moves towards the best one for its coefficients alone, d_i = R s_i / |s_i|^2, all by the
    step t that minimises ||R - t D S_b||.  After scaling to unit norm the coefficients of each column move along
    <u_i, r> on their support by the step that is best for that column.  Both are steps of a block descent (Jacobi's
    preconditioner and a line search), so the error cannot rise, and there is no loop over atoms: three products with
    the residual per block.

    Parameters and returns as of ``update_blocks_in_sequence``.
    """
    return _over_blocks(_block_jointly, A, S, residual, block, sweeps)


def _block_jointly(A: Array, S: Array, residual: Array) -> tuple[Array, Array]:
    xp = namespace(A, S, residual)
    H = S @ S.T
    energies = xp.linalg.diagonal(H)
    P = residual @ S.T
    D = P * quotient(xp.ones_like(energies), energies)[None, :]
    # <R, D S> and ||D S||^2 from the small matrices
    length = quotient(xp.sum(P * D), xp.sum(D * (D @ H)))
    U, sizes = unit_columns(A + length * D)
    used = (energies > 0) & (sizes > 0)
    U = xp.where(used[None, :], U, A)
    rows = S * xp.where(used, sizes, xp.ones_like(sizes))[:, None]
    # U^T (R + A S - U rows): the residual after the atoms moved, without forming it
    correlations = U.T @ residual + (U.T @ A) @ S - (U.T @ U) @ rows
    step = correlations * xp.astype(S != 0, S.dtype)
    image = (U.T @ U) @ step
    lengths = quotient(squared_columns(step), xp.sum(step * image, axis=0))
    return U, rows + lengths[None, :] * step


def _over_blocks(
    refit: Callable[[Array, Array, Array], tuple[Array, Array]],
    A: Array,
    S: Array,
    residual: Array,
    block: int,
    sweeps: int,
) -> tuple[Array, Array, Array]:
    xp = namespace(A, S, residual)
    # Third powers of the sizes leave the range of float32: near one they are safe, and powers of two change no digit.
    largest = max(float(xp.max(xp.abs(S))), float(xp.max(xp.abs(residual))))
    unit = 2.0 ** math.floor(math.log2(largest)) if largest > 0 else 1.0
    A, S, residual = xp.asarray(A, copy=True), S / unit, residual / unit
    for first in range(0, A.shape[1], block):
        part = slice(first, min(first + block, A.shape[1]))
        for _ in range(sweeps):
            atoms, rows = A[:, part], S[part, :]
            new_atoms, new_rows = refit(atoms, rows, residual)
            # One product takes the old block out and puts the new one in.
            change = xp.concat([atoms, -new_atoms], axis=1) @ xp.concat([rows, new_rows], axis=0)
            change += residual
            residual = change
            A[:, part], S[part, :] = new_atoms, new_rows
    return A, S * unit, residual * unit
