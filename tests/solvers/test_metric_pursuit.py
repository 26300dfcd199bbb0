"""Hard thresholding pursuit in a metric on the columns, by way of ``Problem.column_metric``."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.solvers.base import SOLVERS
from cospadi.solvers.htp import HTP
from cospadi.solvers.metric_pursuit import conjugate_gradients_in_metric
from cospadi.whitening.problem import Problem
from tests.helpers_solvers import NAMES, as_library, planted, product, solver, whitened_like


def metric(n, seed=0, decay=0.7, rank=None):
    """A symmetric matrix with correlated columns of very different sizes."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    sizes = np.arange(1, n + 1.0) ** -decay
    sizes[n if rank is None else rank :] = 0
    spread = 1 + rng.random(n) * 3
    M = (turn * sizes) @ turn.T
    return (M + M.T) / 2 * spread * spread[:, None]


def squared(Y, M, solution):
    """tr(E M E^T) in float64."""
    E = np.asarray(Y, np.float64) - product(solution).astype(np.float64)
    return float(np.sum((E @ np.asarray(M, np.float64)) * E))


def zero_error(Y, M):
    return float(np.sum((Y @ M) * Y))


def test_in_the_plain_metric_it_is_about_as_good_as_plain_htp():
    for seed, (d, n, k, s) in enumerate([(24, 40, 16, 6), (40, 24, 20, 8), (12, 60, 12, 3)]):
        Y = whitened_like(d, n, seed)
        plain = HTP().solve(Problem(Y, k, s))
        turned = HTP().solve(Problem(Y, k, s, column_metric=np.eye(n)))
        assert squared(Y, np.eye(n), turned) <= 1.25 * squared(Y, np.eye(n), plain)


def test_a_diagonal_metric_stands_for_column_weights():
    for seed in range(3):
        Y = whitened_like(20, 30, seed)
        f = np.random.default_rng(seed).uniform(0.01, 9, 30)
        weighted = HTP().solve(Problem(Y, 12, 5, column_weights=f))
        turned = HTP().solve(Problem(Y, 12, 5, column_metric=np.diag(f)))
        assert squared(Y, np.diag(f), turned) <= 1.2 * squared(Y, np.diag(f), weighted)


def test_it_gains_from_what_the_diagonal_does_not_tell():
    """Against plain HTP with the metric's diagonal for weights, judged in the metric; columns correlate strongly."""
    for seed in range(3):
        Y, M = whitened_like(20, 30, seed), metric(30, seed, decay=1.2)
        blind = HTP().solve(Problem(Y, 14, 5, column_weights=np.diagonal(M).copy()))
        aware = HTP().solve(Problem(Y, 14, 5, column_metric=M))
        assert squared(Y, M, aware) < 0.8 * squared(Y, M, blind)


@settings(deadline=None, max_examples=40)
@given(
    d=st.integers(1, 16),
    n=st.integers(1, 20),
    k_part=st.floats(0, 1),
    s_part=st.floats(0, 1),
    rank_part=st.floats(0, 1),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_laws_of_every_shape(d, n, k_part, s_part, rank_part, dtype, seed):
    k = max(1, round(k_part * d))
    s = round(s_part * k)
    Y = whitened_like(d, n, seed).astype(dtype)
    Y[:, n // 2] = 0
    M = metric(n, seed, rank=max(1, round(rank_part * n))).astype(dtype)
    kept = Y.copy(), M.copy()
    found = HTP(n_iter=3).solve(Problem(Y, k, s, column_metric=M))
    assert found.dictionary.shape == (d, k)
    assert found.coefficients.shape == (k, n)
    assert found.dictionary.dtype == found.coefficients.dtype == dtype
    assert np.isfinite(found.dictionary).all()
    assert np.isfinite(found.coefficients).all()
    assert np.count_nonzero(found.coefficients, axis=0).max() <= s
    norms = np.linalg.norm(found.dictionary, axis=0)
    assert np.all((np.abs(norms - 1) < 1e-3) | (norms == 0))
    for array, before in zip((Y, M), kept, strict=True):
        np.testing.assert_array_equal(array, before)
    again = HTP(n_iter=3).solve(Problem(Y, k, s, column_metric=M))
    np.testing.assert_array_equal(again.coefficients, found.coefficients)
    # Never above its own start, which itself is never above zero (up to rounding).
    slack = 1e-3 if dtype == np.float32 else 1e-9
    zero = zero_error(Y.astype(np.float64), M.astype(np.float64))
    # Where the metric is singular, rounding knows errors by the sizes of what cancels only.
    total = zero + float(np.sum(Y.astype(np.float64) ** 2 * np.diagonal(M)))
    start = HTP(n_iter=0, final_cg_steps=0).solve(Problem(Y, k, s, column_metric=M))
    assert squared(Y, M, found) <= squared(Y, M, start) + slack * total
    assert squared(Y, M, start) <= zero + slack * total


@pytest.mark.parametrize("n_iter", [0, 1, 2, 5, 20])
def test_more_iterations_and_more_final_steps_do_no_harm(n_iter):
    Y, M = whitened_like(18, 26, 1), metric(26, 2)
    errors = [
        squared(Y, M, HTP(n_iter=n_iter, final_cg_steps=steps).solve(Problem(Y, 12, 4, column_metric=M)))
        for steps in (0, 1, 5, 40)
    ]
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(errors))
    start = squared(Y, M, HTP(n_iter=0, final_cg_steps=0).solve(Problem(Y, 12, 4, column_metric=M)))
    assert errors[0] <= start * (1 + 1e-12)


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**-4, 2.0**12])
@pytest.mark.parametrize("what", ["target", "metric"])
def test_scales_of_target_and_metric_change_nothing_else(factor, what):
    Y, M = whitened_like(14, 20, 3), metric(20, 3)
    plain = HTP(n_iter=4).solve(Problem(Y, 9, 4, column_metric=M))
    if what == "target":
        scaled = HTP(n_iter=4).solve(Problem(factor * Y, 9, 4, column_metric=M))
        np.testing.assert_allclose(product(scaled), factor * product(plain), rtol=1e-9, atol=1e-9 * factor)
    else:
        scaled = HTP(n_iter=4).solve(Problem(Y, 9, 4, column_metric=factor * M))
        np.testing.assert_allclose(product(scaled), product(plain), rtol=1e-9, atol=1e-9)


def test_columns_in_another_order_have_the_same_product():
    Y, M = whitened_like(14, 20, 4), metric(20, 4)
    order = np.random.default_rng(1).permutation(20)
    plain = HTP(n_iter=4).solve(Problem(Y, 9, 4, column_metric=M))
    turned = HTP(n_iter=4).solve(Problem(Y[:, order], 9, 4, column_metric=M[np.ix_(order, order)]))
    np.testing.assert_allclose(product(turned), product(plain)[:, order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (9, 15), (15, 9)])
def test_with_all_atoms_and_all_coefficients_the_target_comes_back(shape):
    Y, M = whitened_like(*shape, 5), metric(shape[1], 5)
    d = shape[0]
    found = HTP(final_cg_steps=60).solve(Problem(Y, d, d, column_metric=M))
    assert squared(Y, M, found) <= 1e-9 * zero_error(Y, M)


@pytest.mark.parametrize("noise_size", [0.003, 0.02])
@pytest.mark.parametrize("seed", range(4))
def test_planted_factors_are_found_to_the_noise(seed, noise_size):
    """With atoms of falling energy the start is near; what remains is less than the noise that was added."""
    rng = np.random.default_rng(seed)
    A = np.linalg.qr(rng.standard_normal((20, 20)))[0][:, :8] * 2.0 ** -np.arange(8)
    S = np.zeros((8, 100))
    for j in range(100):
        S[rng.permutation(8)[:3], j] = rng.uniform(1, 2, 3) * rng.choice([-1, 1], 3)
    M = metric(100, 6, decay=0.3)
    noise = noise_size * rng.standard_normal((20, 100))
    found = HTP(n_iter=60).solve(Problem(A @ S + noise, 8, 3, column_metric=M))
    assert squared(A @ S + noise, M, found) < zero_error(noise, M)


def test_a_planted_target_in_a_random_dictionary_is_approached():
    Y = planted(16, 80, 10, 2, seed=7)[0]
    M = metric(80, 7, decay=0.2)
    found = HTP(n_iter=80).solve(Problem(Y, 10, 2, column_metric=M))
    assert squared(Y, M, found) < 0.25 * zero_error(Y, M)


def test_a_singular_metric_is_solved_within_its_range():
    Y, M = whitened_like(12, 18, 8), metric(18, 8, rank=5)
    found = HTP().solve(Problem(Y, 8, 3, column_metric=M))
    assert np.isfinite(found.coefficients).all()
    # Five directions and eight atoms: the error can nearly vanish where the metric looks.
    assert squared(Y, M, found) < 0.02 * zero_error(Y, M)
    for nothing in (np.zeros((18, 18)), metric(18, 8) * 0):
        ignored = HTP(n_iter=2).solve(Problem(Y, 8, 3, column_metric=nothing))
        assert np.isfinite(ignored.coefficients).all()


def test_a_column_that_the_metric_ignores_stays_finite():
    Y, M = whitened_like(12, 18, 9), metric(18, 9)
    M[4] = M[:, 4] = 0
    found = HTP().solve(Problem(Y, 8, 3, column_metric=M))
    assert np.isfinite(found.coefficients).all()
    rest = np.delete(np.arange(18), 4)
    alone = HTP().solve(Problem(Y[:, rest], 8, 3, column_metric=M[np.ix_(rest, rest)]))
    assert squared(Y, M, found) <= 1.1 * squared(Y[:, rest], M[np.ix_(rest, rest)], alone)


def test_a_zero_target_has_a_zero_product():
    found = HTP(n_iter=3).solve(Problem(np.zeros((5, 7)), 4, 2, column_metric=metric(7)))
    assert not product(found).any()


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_libraries_and_precisions_agree_in_their_error(library):
    Y, M = whitened_like(20, 28, 10), metric(28, 10)
    exact = squared(Y, M, HTP().solve(Problem(Y, 12, 5, column_metric=M)))
    for dtype, rel in ((np.float64, 1e-6), (np.float32, 2e-2)):
        target, given_metric = as_library(Y.astype(dtype), library), as_library(M.astype(dtype), library)
        found = HTP().solve(Problem(target, 12, 5, column_metric=given_metric))
        assert type(found.dictionary) is type(target)
        assert found.coefficients.dtype == target.dtype
        assert squared(Y, M, found) == pytest.approx(exact, rel=rel)


def test_the_array_api_alone_is_enough():
    """The torch code path, which runs on a GPU, gives the error of the numpy one."""
    from cospadi.solvers.metric_pursuit import pursue_in_metric

    Y, M = whitened_like(15, 22, 11), metric(22, 11)
    roots = np.sqrt(np.diagonal(M))
    Y, M = Y * roots, M / np.outer(roots, roots)
    errors = []
    for library in ("numpy", "torch", "strict"):
        A, S = pursue_in_metric(as_library(Y, library), as_library(M, library), 10, 4, 5, 2, 5)
        E = Y - np.asarray(A) @ np.asarray(S)
        errors.append(float(np.sum((E @ M) * E)))
    assert errors[1:] == pytest.approx([errors[0]] * 2, rel=1e-6)


def test_conjugate_gradients_reach_the_least_squares_on_the_support():
    rng = np.random.default_rng(12)
    d, n, k = 9, 7, 5
    A, Y, M = rng.standard_normal((d, k)), rng.standard_normal((d, n)), metric(n, 12)
    support = rng.random((k, n)) < 0.5
    S = np.where(support, rng.standard_normal((k, n)), 0)
    found, image = conjugate_gradients_in_metric(A.T @ A, M, A.T @ Y @ M, S, S @ M, 200)
    np.testing.assert_allclose(image, found @ M, atol=1e-8)
    assert np.array_equal(found != 0, S != 0)
    # vec(E) = vec(Y) - (I kron A) s: weighted least squares over all supported entries at once.
    root = np.linalg.cholesky(M)
    columns = [np.outer(A[:, i], root[j]).ravel() for i, j in zip(*np.nonzero(S), strict=True)]
    best = np.linalg.lstsq(np.stack(columns, axis=1), (Y @ root).ravel(), rcond=None)[0]
    np.testing.assert_allclose(found[np.nonzero(S)], best, rtol=1e-5, atol=1e-7)


def test_solvers_that_know_no_metric_refuse_it():
    Y, M = whitened_like(6, 8, 0), metric(8)
    refusing = [name for name in NAMES if not SOLVERS.get(name).takes_column_metric]
    assert "htp" not in refusing
    assert len(refusing) >= 4
    for name in refusing:
        s = 2 if SOLVERS.get(name).sparse else 4
        with pytest.raises(UsageError, match="takes no column metric: use htp"):
            solver(name).solve(Problem(Y, 4, s, column_metric=M))


def test_misuse_is_refused():
    Y, M = whitened_like(6, 8, 0), metric(8)
    with pytest.raises(UsageError, match="exclude each other"):
        Problem(Y, 4, 2, column_weights=np.ones(8), column_metric=M)
    for shape in ((8, 7), (7, 7), (8,), (6, 6)):
        with pytest.raises(UsageError, match=r"column_metric of shape .* for a target of shape \(6, 8\)"):
            Problem(Y, 4, 2, column_metric=np.ones(shape))
    with pytest.raises(UsageError, match="at most as many"):
        HTP().solve(Problem(Y, 7, 2, column_metric=M))
    for bad in (np.nan, np.inf):
        broken = M.copy()
        broken[2, 3] = bad
        with pytest.raises(NumericalError, match="column metric holds NaN"):
            HTP().solve(Problem(Y, 4, 2, column_metric=broken))
        target = Y.copy()
        target[1, 1] = bad
        with pytest.raises(NumericalError, match="target holds NaN"):
            HTP().solve(Problem(target, 4, 2, column_metric=M))


def test_a_torch_target_keeps_its_dtype_and_device():
    Y = torch.from_numpy(whitened_like(6, 8, 0)).to(torch.float32)
    found = HTP(n_iter=1).solve(Problem(Y, 4, 2, column_metric=torch.eye(8)))
    assert found.dictionary.dtype == torch.float32
    assert found.dictionary.device == Y.device
