"""Compiled loops of the rounding: many rows side by side, one number of each after the other.

A row of numbers that are rounded together is a *column* of the arrays here, so that the innermost loops run along rows
of memory over independent problems.  One thread: a block of numbers takes well under a millisecond in a small model,
less than it costs threads to meet on a machine with other work, and is a small part of the time in a large one.
Importing this module loads numba; the callers import it on first use.  All arrays are C-contiguous and finite, and of
one floating dtype but for ``free`` and ``place``.
"""

import numpy as np
from numba import njit

_LANES = 32  # columns taken together: a group of 128 numbers in float32 then fits the first-level cache


@njit(cache=True, nogil=True, error_model="numpy")
def search_scales(columns, weights, bases, factors, lowest, highest, scales):
    """Write, for each column, the scale factors[c] * base of the least weighted squared rounding error.

    Parameters
    ----------
    columns : array, shape (n, n_columns)
    weights : array, shape (n,)
        Of the squared errors.
    bases : array, shape (n_columns,)
    factors : array, shape (n_factors,)
        The first one wins among equals.
    lowest, highest : float
        Range of the whole numbers.
    scales : array, shape (n_columns,)
        Output.
    """
    n, n_columns = columns.shape
    for part in range((n_columns + _LANES - 1) // _LANES):
        begin = part * _LANES
        width = min(_LANES, n_columns - begin)
        error = np.empty(_LANES, columns.dtype)
        least = np.empty(_LANES, columns.dtype)
        scale = np.empty(_LANES, columns.dtype)
        inverse = np.empty(_LANES, columns.dtype)
        for c in range(factors.shape[0]):
            for r in range(width):
                scale[r] = factors[c] * bases[begin + r]
                inverse[r] = 1 / scale[r]
                error[r] = 0
            for i in range(n):
                weight = weights[i]
                numbers = columns[i, begin : begin + width]
                for r in range(width):
                    whole = min(max(np.rint(numbers[r] * inverse[r]), lowest), highest)
                    difference = numbers[r] - scale[r] * whole
                    error[r] += weight * (difference * difference)
            for r in range(width):
                if c == 0 or error[r] < least[r]:
                    least[r] = error[r]
                    scales[begin + r] = scale[r]


@njit(cache=True, nogil=True, error_model="numpy")
def round_sequentially(columns, feedback, weights, candidates, lowest, highest, wholes, scales):
    """Round the numbers of each column in turn, each made up for by those after it, under the best candidate scale.

    Parameters
    ----------
    columns : array, shape (n, n_columns)
    feedback : array, shape (n, n)
        What the error of number i adds to what number j > i is rounded from.
    weights : array, shape (n,)
        Of the squared errors of what was rounded.
    candidates : array, shape (n_candidates, n_columns)
        Scales; the whole column is rounded under each, and the first one wins among equals.
    lowest, highest : float
        Range of the whole numbers.
    wholes : array, shape (n, n_columns)
        Output: whole numbers.
    scales : array, shape (n_columns,)
        Output: the candidate taken.
    """
    n, n_columns = columns.shape
    for part in range((n_columns + _LANES - 1) // _LANES):
        begin = part * _LANES
        width = min(_LANES, n_columns - begin)
        shifted = np.zeros((n, _LANES), columns.dtype)
        trial = np.empty((n, _LANES), columns.dtype)
        error = np.empty(_LANES, columns.dtype)
        least = np.empty(_LANES, columns.dtype)
        inverse = np.empty(_LANES, columns.dtype)
        for c in range(candidates.shape[0]):
            scale = candidates[c, begin : begin + width]
            for r in range(width):
                inverse[r] = 1 / scale[r]
                error[r] = 0
            for i in range(n):
                for r in range(width):
                    shifted[i, r] = columns[i, begin + r]
            for i in range(n):
                weight = weights[i]
                row = shifted[i]
                own = columns[i, begin : begin + width]
                for r in range(width):
                    whole = min(max(np.rint(row[r] * inverse[r]), lowest), highest)
                    difference = row[r] - scale[r] * whole
                    error[r] += weight * (difference * difference)
                    trial[i, r] = whole
                    row[r] = own[r] - scale[r] * whole
                for j in range(i + 1, n):
                    factor = feedback[i, j]
                    later = shifted[j]
                    for r in range(_LANES):
                        later[r] += factor * row[r]
            for r in range(width):
                if c == 0 or error[r] < least[r]:
                    least[r] = error[r]
                    scales[begin + r] = scale[r]
                    for i in range(n):
                        wholes[i, begin + r] = trial[i, r]


@njit(cache=True, nogil=True, error_model="numpy")
def round_coordinates(slopes, gram, numbers, scales, place, free, lowest, highest, steps):
    """Move each number in turn to the point of its grid that minimises the error, given all the others.

    Parameters
    ----------
    slopes : array, shape (n, n_columns)
        Half the derivative by which the squared error falls as a number grows.
    gram : array, shape (n, n)
        Half the second derivative.
    numbers : array, shape (n, n_columns)
        Where they are; modified.
    scales : array, shape (n_groups, n_columns)
    place : array, shape (n,), int64
        Group of each number.
    free : array, shape (n, n_columns), uint8
        0 where a number must stay.
    lowest, highest : float
        Range of the whole numbers.
    steps : array, shape (n, n_columns)
        Output: by how much each number moved.
    """
    n, n_columns = slopes.shape
    for part in range((n_columns + _LANES - 1) // _LANES):
        begin = part * _LANES
        width = min(_LANES, n_columns - begin)
        slope = np.zeros((n, _LANES), slopes.dtype)
        step = np.zeros(_LANES, slopes.dtype)
        for i in range(n):
            for r in range(width):
                slope[i, r] = slopes[i, begin + r]
        for i in range(n):
            curvature = gram[i, i]
            inverse = 1 / curvature if curvature > 0 else curvature * 0
            scale = scales[place[i], begin : begin + width]
            here = numbers[i, begin : begin + width]
            may = free[i, begin : begin + width]
            row = slope[i]
            for r in range(width):
                whole = min(max(np.rint((here[r] + row[r] * inverse) / scale[r]), lowest), highest)
                step[r] = (scale[r] * whole - here[r]) * may[r]
                here[r] += step[r]
                steps[i, begin + r] = step[r]
            for j in range(i + 1, n):
                factor = gram[i, j]
                later = slope[j]
                for r in range(_LANES):
                    later[r] -= factor * step[r]
