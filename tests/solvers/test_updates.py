"""The closed-form pieces: each one optimal in its own sense."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.solvers.updates import (
    hard_threshold,
    leading_left_singular_vectors,
    least_squares_dictionary,
    polar_factor,
    spectral_start,
    unit_columns,
)
from tests.helpers_solvers import as_library, whitened_like

LIBRARIES = pytest.mark.parametrize("library", ["numpy", "torch", "strict"])


@LIBRARIES
@settings(max_examples=25, deadline=None)
@given(
    k=st.integers(1, 12), n=st.integers(1, 9), s=st.integers(0, 12), levels=st.integers(1, 6), seed=st.integers(0, 99)
)
@example(k=6, n=1, s=3, levels=3, seed=0)
def test_the_threshold_keeps_the_largest_and_of_equals_the_first(library, k, n, s, levels, seed):
    V = np.random.default_rng(seed).integers(-levels, levels + 1, (k, n)).astype(np.float64)
    s = min(s, k)
    kept = np.asarray(hard_threshold(as_library(V, library), s))
    expected = np.zeros_like(V)
    for j in range(n):
        rows = np.argsort(-np.abs(V[:, j]), kind="stable")[:s]
        expected[rows, j] = V[rows, j]
    np.testing.assert_array_equal(kept, expected)


@LIBRARIES
@pytest.mark.parametrize(("d", "n", "k"), [(9, 20, 5), (20, 9, 5), (20, 9, 15), (7, 7, 7), (1, 4, 1)])
def test_singular_vectors_are_orthonormal_and_hold_the_most_energy(library, d, n, k):
    Y = whitened_like(d, n, seed=d)
    U = np.asarray(leading_left_singular_vectors(as_library(Y, library), k))
    np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-10)
    values = np.linalg.svd(Y, compute_uv=False)
    assert np.sum((U.T @ Y) ** 2) == pytest.approx(np.sum(values[:k] ** 2))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_directions_beyond_the_rank_complete_an_orthonormal_set(shape):
    for Y in (np.zeros(shape), np.ones(shape), np.full(shape, 1e-30)):
        U = leading_left_singular_vectors(Y, 6)
        np.testing.assert_allclose(U.T @ U, np.eye(6), atol=1e-10)


@LIBRARIES
def test_the_least_squares_dictionary_has_no_gradient_left(library):
    rng = np.random.default_rng(0)
    Y, S = rng.standard_normal((8, 60)), rng.standard_normal((10, 60)) * 10.0 ** -np.arange(10)[:, None]
    S[3] = 0
    previous = rng.standard_normal((8, 10))
    A = np.asarray(least_squares_dictionary(*(as_library(a, library) for a in (Y, S, previous))))
    # relative to the size of each row of S, which fall by nine orders of magnitude
    gradient = (Y - A @ S) @ S.T / np.maximum(np.linalg.norm(S, axis=1), 1e-300)
    assert np.abs(gradient).max() < 1e-9
    np.testing.assert_array_equal(A[:, 3], previous[:, 3])
    expected = np.linalg.lstsq(S.T, Y.T, rcond=1e-14)[0].T
    np.testing.assert_allclose((A @ S), expected @ S, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equal_rows_of_coefficients_keep_the_dictionary_finite(dtype):
    rng = np.random.default_rng(1)
    Y, S = rng.standard_normal((8, 60)).astype(dtype), rng.standard_normal((6, 60)).astype(dtype)
    S[4], S[5] = S[0], -2 * S[0]
    A = least_squares_dictionary(Y, S, np.zeros((8, 6), dtype))
    best = np.linalg.norm(Y - np.linalg.lstsq(S[:4].T, Y.T, rcond=None)[0].T @ S[:4])
    assert np.linalg.norm(Y - A @ S) == pytest.approx(best, rel=1e-3)


@LIBRARIES
def test_the_polar_factor_is_the_nearest_orthonormal_matrix(library):
    rng = np.random.default_rng(2)
    M = rng.standard_normal((9, 5))
    Q = np.asarray(polar_factor(as_library(M, library)))
    np.testing.assert_allclose(Q.T @ Q, np.eye(5), atol=1e-12)
    for _ in range(20):
        other = np.linalg.qr(Q + 0.1 * rng.standard_normal((9, 5)))[0]
        assert np.linalg.norm(M - Q) < np.linalg.norm(M - other)
    np.testing.assert_allclose(polar_factor(np.zeros((4, 3))).T @ polar_factor(np.zeros((4, 3))), np.eye(3), atol=1e-12)


def test_unit_columns_have_norm_one_or_zero_at_any_scale():
    V = np.array([[3e-30, 0, 3e30], [4e-30, 0, 4e30]], dtype=np.float32)
    unit, norms = unit_columns(V)
    np.testing.assert_allclose(unit, [[0.6, 0, 0.6], [0.8, 0, 0.8]], rtol=1e-6)
    np.testing.assert_allclose(norms, [5e-30, 0, 5e30], rtol=1e-6)


@LIBRARIES
@pytest.mark.parametrize(("k", "s"), [(5, 2), (8, 3), (12, 3), (12, 0), (8, 8), (40, 6)])
def test_the_start_has_unit_atoms_and_the_asked_sparsity(library, k, s):
    Y = whitened_like(8, 20, seed=3)
    A, S = (np.asarray(a) for a in spectral_start(as_library(Y, library), k, s))
    assert A.shape == (8, k)
    assert S.shape == (k, 20)
    np.testing.assert_allclose(np.linalg.norm(A, axis=0), 1)
    assert np.count_nonzero(S, axis=0).max() <= s
    if k > 8 and s:
        before = np.linalg.norm(Y - np.matmul(*spectral_start(Y, 8, s)), axis=0)
        after = np.linalg.norm(Y - A @ S, axis=0)
        worst = np.argsort(-before)[: k - 8]
        assert np.all(after[worst] < 1e-12)
        np.testing.assert_allclose(np.delete(after, worst), np.delete(before, worst))
