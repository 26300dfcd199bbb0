"""Sparse weights, whose dictionary is the identity: counts, exact cases, and least squares on the support."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.solvers.sparse_weight import keep_largest, sparsify
from tests.helpers_solvers import as_library


def gram(d, seed=0, decay=0.6, tokens=None):
    """A Gram of correlated inputs of different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((d, d)) * np.arange(1, d + 1.0) ** -decay
    x = rng.standard_normal((tokens or 4 * d, d)) @ mix.T
    return x.T @ x


def weight(d, n, seed=0):
    return np.random.default_rng(seed + 1000).standard_normal((d, n))


def squared(W, G, S, scales=None):
    """tr((W - S)^T G (W - S) F) in float64."""
    E = (np.asarray(W, np.float64) - np.asarray(S, np.float64)) * (1 if scales is None else scales)
    return float(np.sum(E * (np.asarray(G, np.float64) @ E)))


def thresholded(W, G, n_nonzero, scales=None):
    """W cut to the entries whose loss alone costs most."""
    cost = np.abs(W) * np.sqrt(np.maximum(np.diagonal(G), 0))[:, None] * (1 if scales is None else scales)
    order = np.argsort(-cost, axis=None, kind="stable")[:n_nonzero]
    S = np.zeros_like(W)
    S.flat[order] = W.flat[order]
    return S


@settings(deadline=None, max_examples=60)
@given(
    d=st.integers(1, 14),
    n=st.integers(1, 14),
    part=st.floats(0, 1.2),
    tokens=st.integers(1, 60),
    scaled=st.booleans(),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_laws_of_every_shape(d, n, part, tokens, scaled, dtype, seed):
    W, G = weight(d, n, seed).astype(dtype), gram(d, seed, tokens=tokens).astype(dtype)
    W[:, n // 2] = 0
    scales = np.random.default_rng(seed).uniform(0.1, 5, n).astype(dtype) if scaled else None
    n_nonzero = round(part * d * n)
    kept = W.copy(), G.copy()
    S = sparsify(W, G, n_nonzero, scales, n_iter=3, final_cg_steps=8)
    assert S.shape == W.shape
    assert S.dtype == dtype
    assert np.isfinite(S).all()
    assert np.count_nonzero(S) <= n_nonzero
    for array, before in zip((W, G), kept, strict=True):
        np.testing.assert_array_equal(array, before)
    np.testing.assert_array_equal(S, sparsify(W, G, n_nonzero, scales, n_iter=3, final_cg_steps=8))
    # Never worse than thresholding alone; where the Gram is singular float32 knows errors to rounding only.
    zero = squared(W, G, np.zeros_like(W), scales)
    slack = (1e-4 if dtype == np.float32 else 1e-10) * zero
    assert squared(W, G, S, scales) <= squared(W, G, thresholded(W, G, n_nonzero, scales), scales) + slack


@pytest.mark.parametrize("n_nonzero", [35, 36, 10**6])
def test_with_room_for_all_the_weight_comes_back(n_nonzero):
    W, G = weight(5, 7), gram(5)
    np.testing.assert_allclose(sparsify(W, G, n_nonzero, np.linspace(1, 3, 7)), W, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n_nonzero", [0, -3])
def test_without_room_nothing_is_kept(n_nonzero):
    assert not sparsify(weight(5, 7), gram(5), n_nonzero).any()


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("n_nonzero", [1, 20, 59])
def test_with_independent_inputs_the_largest_entries_are_exact(n_nonzero, scaled):
    W = weight(6, 10, 3)
    sizes = np.linspace(0.5, 4, 6)
    scales = np.linspace(1, 9, 10) if scaled else None
    for G in (np.eye(6), np.diag(sizes)):
        best = thresholded(W, G, n_nonzero, scales)
        np.testing.assert_allclose(sparsify(W, G, n_nonzero, scales), best, rtol=1e-12, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_every_column_is_the_least_squares_on_its_support(seed):
    d, n = 12, 9
    x = np.random.default_rng(seed).standard_normal((40, d)) @ weight(d, d, seed)
    W, scales = weight(d, n, seed), np.linspace(1, 5, n)
    S = sparsify(W, x.T @ x, 50, scales, final_cg_steps=400)
    assert np.count_nonzero(S) == 50
    for j in range(n):
        support = np.flatnonzero(S[:, j])
        best = np.linalg.lstsq(x[:, support], x @ W[:, j], rcond=None)[0]
        np.testing.assert_allclose(S[support, j], best, rtol=1e-4, atol=1e-6)


def test_it_gains_much_over_thresholding_where_inputs_correlate():
    ratios = []
    for seed in range(4):
        W, G = weight(20, 30, seed), gram(20, seed)
        ratios.append(squared(W, G, sparsify(W, G, 240)) / squared(W, G, thresholded(W, G, 240)))
    assert max(ratios) < 0.7


def test_more_iterations_and_final_steps_do_no_harm():
    W, G = weight(16, 20, 5), gram(16, 5)
    errors = [squared(W, G, sparsify(W, G, 120, n_iter=k, final_cg_steps=0)) for k in (0, 4, 12, 24)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    errors = [squared(W, G, sparsify(W, G, 120, final_cg_steps=k)) for k in (0, 1, 3, 10, 50)]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))


@pytest.mark.parametrize("power", [-40, -6, 6, 40])
def test_scales_of_weight_gram_and_columns_change_nothing_else(power):
    W, G, scales = weight(9, 11, 6), gram(9, 6), np.linspace(1, 4, 11)
    S, factor = sparsify(W, G, 40, scales), 2.0**power
    np.testing.assert_allclose(sparsify(factor * W, G, 40, scales), factor * S, rtol=1e-9)
    np.testing.assert_allclose(sparsify(W, factor * G, 40, scales), S, rtol=1e-9)
    np.testing.assert_allclose(sparsify(W, G, 40, factor * scales), S, rtol=1e-9)
    # Inputs in other units: the entries of that row move the other way.
    units = 2.0 ** np.arange(-4, 5)
    turned = sparsify(W / units[:, None], G * units * units[:, None], 40, scales)
    np.testing.assert_allclose(turned * units[:, None], S, rtol=1e-9)


def test_rows_and_columns_in_another_order_give_the_same_entries():
    W, G, scales = weight(9, 11, 7), gram(9, 7), np.linspace(1, 4, 11)
    S = sparsify(W, G, 40, scales)
    rng = np.random.default_rng(0)
    rows, columns = rng.permutation(9), rng.permutation(11)
    turned = sparsify(W[np.ix_(rows, columns)], G[np.ix_(rows, rows)], 40, scales[columns])
    np.testing.assert_allclose(turned, S[np.ix_(rows, columns)], rtol=1e-6, atol=1e-9)


def test_entries_go_to_the_columns_that_cost_most():
    W, G = weight(12, 10, 8), gram(12, 8)
    scales = np.where(np.arange(10) < 3, 20.0, 1.0)
    counts = np.count_nonzero(sparsify(W, G, 48, scales), axis=0)
    assert counts[:3].min() > counts[3:].max()
    assert counts.sum() == 48


@pytest.mark.parametrize("library", ["numpy", "torch", "strict"])
def test_libraries_agree(library):
    W, G, scales = weight(9, 11, 9), gram(9, 9), np.linspace(1, 4, 11)
    S = sparsify(W, G, 40, scales)
    found = sparsify(*(as_library(array, library) for array in (W, G)), 40, as_library(scales, library))
    np.testing.assert_allclose(np.asarray(found), S, rtol=1e-7, atol=1e-10)


def test_single_precision_is_nearly_as_good():
    W, G = weight(20, 30, 10), gram(20, 10)
    exact = squared(W, G, sparsify(W, G, 240))
    single = sparsify(W.astype(np.float32), G.astype(np.float32), 240)
    assert squared(W, G, single) == pytest.approx(exact, rel=0.02)


def test_inputs_that_are_always_zero_cost_nothing_and_stay_finite():
    W, G = weight(8, 6, 11), gram(8, 11)
    G[2] = G[:, 2] = 0
    S = sparsify(W, G, 20)
    assert np.isfinite(S).all()
    assert np.count_nonzero(S) <= 20
    assert squared(W, G, S) <= squared(W, G, thresholded(W, G, 20))
    nothing = sparsify(W, np.zeros((8, 8)), 20)
    assert np.isfinite(nothing).all()
    assert np.count_nonzero(nothing) <= 20


@pytest.mark.parametrize("library", ["numpy", "torch", "strict"])
@pytest.mark.parametrize("n_nonzero", range(0, 14))
def test_keep_largest_keeps_exactly_so_many_and_the_first_among_equals(library, n_nonzero):
    V = np.array([[2.0, -1.0, 2.0, 0.5], [-2.0, 1.0, 2.0, -1.0], [1.0, 1.0, 0.25, 3.0]])
    kept = np.asarray(keep_largest(as_library(V, library), n_nonzero))
    order = np.argsort(-np.abs(V), axis=None, kind="stable")[:n_nonzero]
    expected = np.zeros_like(V)
    expected.flat[order] = V.flat[order]
    np.testing.assert_array_equal(kept, expected)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(-1, 40), st.integers(0, 99))
def test_keep_largest_is_that_of_a_stable_sort(d, n, n_nonzero, seed):
    V = np.random.default_rng(seed).integers(-2, 3, (d, n)).astype(float)
    order = np.argsort(-np.abs(V), axis=None, kind="stable")[: max(0, n_nonzero)]
    expected = np.zeros_like(V)
    expected.flat[order] = V.flat[order]
    np.testing.assert_array_equal(keep_largest(V, n_nonzero), expected)


def test_equal_entries_do_not_exceed_the_count():
    S = sparsify(np.ones((6, 5)), np.eye(6), 13)
    assert np.count_nonzero(S) == 13
    np.testing.assert_array_equal(S[S != 0], 1)
