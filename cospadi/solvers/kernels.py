"""Compiled loops for arrays on the CPU: matching pursuit of one column, and the sequential update of the atoms.

Both are bound by how fast numbers come from the cache, not by arithmetic: the pursuit keeps what it knows of one column
in the second-level cache, and the atom update reads each residual row once per power step.  Importing this module loads
numba; the callers import it on first use.  All arrays are C-contiguous, float32 or float64, and finite.
"""

from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

# Sums may be re-ordered and fused, which vectorises them; the compiled order does not depend on the thread count.
_FAST = {"reassoc", "contract", "arcp", "nsz", "nnan", "ninf"}
_COLUMNS_PER_TASK = 8
_ROWS_PER_TASK = 32
_SCAN = 64
# Threads meet after each power step.  Below this many residual entries a step is so short (a fraction of a millisecond)
# that on a machine with other work the meeting costs more than the second core gives.
_SERIAL_BELOW = 1 << 20


@njit(fastmath=_FAST, cache=True, inline="always")
def _select(correlations, atoms, width, maxima):
    """Give the position of the largest magnitude (of the lowest atom among equals) and that magnitude."""
    largest = correlations[0] * 0
    for block in range((width + _SCAN - 1) // _SCAN):
        top = largest * 0
        for t in range(block * _SCAN, min(width, (block + 1) * _SCAN)):
            top = max(top, abs(correlations[t]))
        maxima[block] = top
        largest = max(largest, top)
    position = 0
    lowest = atoms.shape[0]
    for block in range((width + _SCAN - 1) // _SCAN):
        if maxima[block] == largest:
            for t in range(block * _SCAN, min(width, (block + 1) * _SCAN)):
                if abs(correlations[t]) == largest and atoms[t] < lowest:
                    lowest = atoms[t]
                    position = t
    return position, largest


@njit(fastmath=_FAST, cache=True, inline="always")
def _subtract_rows(row, rows, factors, count, width):
    """Subtract sum_l factors[l] * rows[l] from a row, eight rows at a time so that the row stays in registers."""
    done = count - count % 8
    for b in range(0, done, 8):
        p0, p1, p2, p3 = rows[b], rows[b + 1], rows[b + 2], rows[b + 3]
        p4, p5, p6, p7 = rows[b + 4], rows[b + 5], rows[b + 6], rows[b + 7]
        f0, f1, f2, f3 = factors[b], factors[b + 1], factors[b + 2], factors[b + 3]
        f4, f5, f6, f7 = factors[b + 4], factors[b + 5], factors[b + 6], factors[b + 7]
        for t in range(width):
            low = f0 * p0[t] + f1 * p1[t] + f2 * p2[t] + f3 * p3[t]
            row[t] -= low + (f4 * p4[t] + f5 * p5[t] + f6 * p6[t] + f7 * p7[t])
    for b in range(done, count):
        p = rows[b]
        f = factors[b]
        for t in range(width):
            row[t] -= f * p[t]


@njit(fastmath=_FAST, cache=True)
def _pursue(
    gram, start, n_nonzero, pivot_floor, noise, rows, triangle, row, alpha, atoms, maxima, solution, coefficients
):
    """Code one column; give whether a dependent atom ended it early.  The last seven arrays are work space."""
    n_atoms = gram.shape[0]
    for t in range(n_atoms):
        atoms[t] = t
        alpha[t] = start[t]
    floor = -noise
    count = 0
    dependent = False
    for j in range(n_nonzero):
        width = n_atoms - j
        position, largest = _select(alpha, atoms, width, maxima)
        if floor < 0:
            floor = noise * largest
        if largest <= floor:  # what is left is rounding noise: the column is reproduced
            break
        atom = atoms[position]
        factors = triangle[j]
        last = width - 1
        energy = gram[atom, atom]
        for m in range(j):
            f = rows[m, position]
            rows[m, position] = rows[m, last]  # used atoms leave the rows, which saves a third of the work
            factors[m] = f
            energy -= f * f
        if energy <= pivot_floor:
            dependent = True
            break
        pivot = np.sqrt(energy)
        factors[j] = pivot
        solution[j] = alpha[position] / pivot
        alpha[position] = alpha[last]
        atoms[position] = atoms[last]
        atoms[last] = atom
        count += 1
        if count == n_nonzero:
            break
        gram_row = gram[atom]
        for t in range(last):
            row[t] = gram_row[atoms[t]]
        _subtract_rows(row, rows, factors, j, last)
        scale = 1 / pivot
        step = solution[j]
        new = rows[j]
        for t in range(last):
            value = row[t] * scale
            new[t] = value
            alpha[t] -= step * value
    for t in range(n_atoms):
        coefficients[t] = 0
    for j in range(count - 1, -1, -1):
        factors = triangle[j]
        x = solution[j] / factors[j]
        coefficients[atoms[n_atoms - 1 - j]] = x
        for m in range(j):
            solution[m] -= x * factors[m]
    return dependent


@njit(parallel=True, fastmath=_FAST, cache=True)
def _pursue_all(gram, starts, n_nonzero, pivot_floor, noise, coefficients, dependent):
    n_columns, n_atoms = starts.shape
    # An odd number of cache lines per row keeps the strided accesses of one atom in different sets of the cache.
    stride = ((n_atoms + 15) // 16 | 1) * 16
    for task in prange((n_columns + _COLUMNS_PER_TASK - 1) // _COLUMNS_PER_TASK):
        rows = np.empty((n_nonzero, stride), gram.dtype)
        triangle = np.empty((n_nonzero, n_nonzero), gram.dtype)
        row = np.empty(n_atoms, gram.dtype)
        alpha = np.empty(n_atoms, gram.dtype)
        atoms = np.empty(n_atoms, np.int64)
        maxima = np.empty(n_atoms // _SCAN + 1, gram.dtype)
        solution = np.empty(n_nonzero, gram.dtype)
        for column in range(task * _COLUMNS_PER_TASK, min(n_columns, (task + 1) * _COLUMNS_PER_TASK)):
            dependent[column] = _pursue(
                gram,
                starts[column],
                n_nonzero,
                pivot_floor,
                noise,
                rows,
                triangle,
                row,
                alpha,
                atoms,
                maxima,
                solution,
                coefficients[column],
            )


def pursue(
    gram: NDArray[Any], starts: NDArray[Any], n_nonzero: int, pivot_floor: float, noise: float
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Code columns by orthogonal matching pursuit; see ``BatchOMP`` for the recursion.

    Parameters
    ----------
    gram : ndarray, shape (n_atoms, n_atoms)
        A^T A.
    starts : ndarray, shape (n_columns, n_atoms)
        A^T y, one column of the target per row.
    n_nonzero : int
        Atoms per column.
    pivot_floor : float
        An atom whose squared distance to the span of the chosen ones is not above this is dependent.
    noise : float
        A column ends when no correlation exceeds this part of its first one.

    Returns
    -------
    coefficients : ndarray, shape (n_columns, n_atoms)
    dependent : ndarray, shape (n_columns,), bool
        Columns that a dependent atom ended early.
    """
    coefficients = np.zeros_like(starts)
    dependent = np.zeros(starts.shape[0], dtype=np.bool_)
    if n_nonzero:
        number = gram.dtype.type
        _pursue_all(gram, starts, n_nonzero, number(pivot_floor), number(noise), coefficients, dependent)
    return coefficients, dependent


@njit(fastmath=_FAST, cache=True)
def _project_rows(residual, support, old, atom, coefficients, overlap, total):
    """Sum into ``total``, over the given rows, v_j (r_j + s_j a) with v_j = <r_j + s_j a, u>; a is the old atom."""
    d = atom.shape[0]
    along_old = overlap * 0
    for t in range(d):
        total[t] = 0
    for p in range(support.shape[0]):
        r = residual[support[p]]
        s = coefficients[support[p]]
        v = s * overlap
        for t in range(d):
            v += r[t] * atom[t]
        along_old += s * v
        for t in range(d):
            total[t] += v * r[t]
    for t in range(d):
        total[t] += along_old * old[t]


@njit(fastmath=_FAST, cache=True)
def _refit_rows(residual, support, old, atom, coefficients, overlap):
    """Over the given rows: put v_j in the place of s_j, and r_j + s_j a - v_j u in the place of r_j."""
    d = atom.shape[0]
    for p in range(support.shape[0]):
        r = residual[support[p]]
        s = coefficients[support[p]]
        v = s * overlap
        for t in range(d):
            v += r[t] * atom[t]
        for t in range(d):
            r[t] += s * old[t] - v * atom[t]
        coefficients[support[p]] = v


@njit(fastmath=_FAST, cache=True)
def _rows_task(residual, support, task, old, atom, coefficients, overlap, totals, refit):
    part = support[task * _ROWS_PER_TASK : (task + 1) * _ROWS_PER_TASK]
    if refit:
        _refit_rows(residual, part, old, atom, coefficients, overlap)
    else:
        _project_rows(residual, part, old, atom, coefficients, overlap, totals[task])


@njit(parallel=True, fastmath=_FAST, cache=True)
def _over_rows(residual, support, old, atom, coefficients, totals, refit):
    overlap = old[0] * 0
    for t in range(old.shape[0]):
        overlap += old[t] * atom[t]
    tasks = (support.shape[0] + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK
    if support.shape[0] * old.shape[0] < _SERIAL_BELOW:
        for task in range(tasks):
            _rows_task(residual, support, task, old, atom, coefficients, overlap, totals, refit)
    else:
        for task in prange(tasks):
            _rows_task(residual, support, task, old, atom, coefficients, overlap, totals, refit)


@njit(fastmath=_FAST, cache=True)
def update_atoms(residual, atoms, coefficients, power_iterations):
    """Refit each atom and its row of coefficients in turn, all three arrays in place (Aharon, Elad, Bruckstein 2006).

    Parameters
    ----------
    residual : ndarray, shape (n_columns, in_features)
        (Y - A S)^T.
    atoms : ndarray, shape (n_atoms, in_features)
        A^T, rows of unit norm.
    coefficients : ndarray, shape (n_atoms, n_columns)
        S; its support is kept.
    power_iterations : int
        Power steps towards the leading singular pair of the residual without the atom, on the atom's columns.
    """
    n_columns, d = residual.shape
    support = np.empty(n_columns, np.int64)
    # One sum per fixed task, added up in order: the result does not depend on the number of threads.
    totals = np.empty((n_columns // _ROWS_PER_TASK + 1, d), residual.dtype)
    atom = np.empty(d, residual.dtype)
    for i in range(atoms.shape[0]):
        old = atoms[i]
        row = coefficients[i]
        count = 0
        for j in range(n_columns):
            if row[j] != 0:
                support[count] = j
                count += 1
        if count == 0:
            continue
        for t in range(d):
            atom[t] = old[t]
        for _ in range(power_iterations):
            _over_rows(residual, support[:count], old, atom, row, totals, False)
            total = totals[0]
            for task in range(1, (count + _ROWS_PER_TASK - 1) // _ROWS_PER_TASK):
                for t in range(d):
                    total[t] += totals[task, t]
            energy = 0.0
            for t in range(d):
                energy += np.float64(total[t]) * np.float64(total[t])
            if energy == 0:
                break
            scale = 1 / np.sqrt(energy)
            for t in range(d):
                atom[t] = total[t] * scale
        _over_rows(residual, support[:count], old, atom, row, totals, True)
        for t in range(d):
            old[t] = atom[t]
