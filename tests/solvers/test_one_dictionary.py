"""A dictionary that layers with inputs of their own share: the dictionary step and the learner."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.solvers.htp import HTP
from cospadi.solvers.mod import MOD
from cospadi.solvers.one_dictionary import SharedHTP
from cospadi.solvers.shared_problem import SharedProblem, relative_layers
from cospadi.solvers.sylvester import closed_form_dictionary, iterative_dictionary
from cospadi.whitening.problem import Problem


def factor(d, seed, decay=1.0):
    """The Cholesky factor of a Gram with falling eigenvalues."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return np.linalg.cholesky((directions * np.arange(1, d + 1.0) ** -decay) @ directions.T)


def problem(d=16, widths=(40, 30), n_atoms=12, n_nonzero=4, seed=0, dtype=np.float64, **options):
    rng = np.random.default_rng(seed)
    weights = tuple(rng.standard_normal((d, n)).astype(dtype) for n in widths)
    factors = tuple(factor(d, seed + index) for index in range(len(widths)))
    return SharedProblem(weights, factors, n_atoms, n_nonzero, **options)


def objective(problem, solution):
    """The objective as it is defined, in float64."""
    total = 0.0
    for index, (W, L, S) in enumerate(zip(problem.weights, problem.factors, solution.coefficients, strict=True)):
        residual = np.asarray(L).T @ (np.asarray(W, np.float64) - np.asarray(solution.dictionary) @ np.asarray(S))
        f = 1.0 if problem.column_weights is None else problem.column_weights[index]
        w = 1.0 if problem.layer_weights is None else problem.layer_weights[index]
        total += w * float((residual**2 * f).sum())
    return total


def equation(seed, d=7, k=5, widths=(9, 6, 8), density=0.6):
    """Metrics that sum to the identity, products, codes, a start, and the solution by one dense linear system."""
    rng = np.random.default_rng(seed)
    roots = np.linalg.qr(rng.standard_normal((len(widths) * d, d)))[0]
    metrics = [R.T @ R for R in np.split(roots, len(widths))]
    codes = [rng.standard_normal((k, n)) * (rng.random((k, n)) < density) for n in widths]
    products = [M @ rng.standard_normal((d, n)) for M, n in zip(metrics, widths, strict=True)]
    system = sum(np.kron(M, S @ S.T) for M, S in zip(metrics, codes, strict=True))
    right = sum(Z @ S.T for Z, S in zip(products, codes, strict=True))
    expected = np.linalg.lstsq(system, right.ravel(), rcond=None)[0].reshape(d, k)
    return metrics, products, codes, rng.standard_normal((d, k)), expected


@pytest.mark.parametrize("widths", [(9,), (9, 8), (9, 7, 8), (9, 8, 6, 7, 9)])
def test_conjugate_gradients_solve_the_equation_for_any_number_of_layers(widths):
    metrics, products, codes, start, expected = equation(1, widths=widths)
    fit = iterative_dictionary(metrics, products, codes, start, tolerance=1e-12, max_steps=200)
    np.testing.assert_allclose(fit.dictionary, expected, atol=1e-8)
    assert fit.residual <= 1e-12


def test_the_closed_form_solves_the_equation_of_two_layers():
    metrics, products, codes, start, expected = equation(2, widths=(9, 8))
    fit = closed_form_dictionary(metrics, products, codes, start)
    np.testing.assert_allclose(fit.dictionary, expected, atol=1e-9)
    iterative = iterative_dictionary(metrics, products, codes, start, tolerance=1e-12, max_steps=200)
    assert fit.decrease == pytest.approx(iterative.decrease, rel=1e-9)
    with pytest.raises(ValueError, match="two layers, got 1"):
        closed_form_dictionary(metrics[:1], products[:1], codes[:1], start)


def test_both_agree_with_generalised_eigenvectors_of_unnormalised_grams():
    """GeoPair's own formula, with scipy's generalised eigenvectors of the Grams and of the codes' Grams."""
    given = problem(d=8, widths=(20, 15), n_atoms=6)
    rng = np.random.default_rng(3)
    codes = [rng.standard_normal((6, n)) for n in (20, 15)]
    grams = [L @ L.T for L in given.factors]
    right = sum(G @ W @ S.T for G, W, S in zip(grams, given.weights, codes, strict=True))
    p, P = scipy.linalg.eigh(grams[1], grams[0])
    q, Q = scipy.linalg.eigh(codes[1] @ codes[1].T, codes[0] @ codes[0].T)
    D = P @ ((P.T @ right @ Q) / (1 + np.outer(p, q))) @ Q.T
    layers, upper = relative_layers(given)
    metrics, products = [la.metric for la in layers], [la.product for la in layers]
    codes = [S * layer.column_scales for S, layer in zip(codes, layers, strict=True)]
    start = np.zeros((8, 6))
    closed = closed_form_dictionary(metrics, products, codes, start)
    iterative = iterative_dictionary(metrics, products, codes, start, tolerance=1e-13, max_steps=500)
    np.testing.assert_allclose(np.linalg.solve(upper, closed.dictionary), D, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(np.linalg.solve(upper, iterative.dictionary), D, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_step_on_the_dictionary_lowers_the_sum_of_squares_by_what_it_says(dtype):
    given = problem(dtype=dtype)
    layers, _ = relative_layers(given)
    rng = np.random.default_rng(0)
    codes = [rng.standard_normal((12, n)).astype(dtype) * (rng.random((12, n)) < 0.3) for n in (40, 30)]
    codes = [S.astype(dtype) for S in codes]
    start = rng.standard_normal((16, 12)).astype(dtype)

    def error(A):
        return sum(layer.squared_error(A, S) for layer, S in zip(layers, codes, strict=True))

    errors = []
    for steps in range(8):
        fit = iterative_dictionary(
            [la.metric for la in layers], [la.product for la in layers], codes, start, 0.0, steps
        )
        assert fit.steps == steps
        assert fit.dictionary.dtype == dtype
        errors.append(error(fit.dictionary))
        assert errors[0] - errors[-1] == pytest.approx(fit.decrease, rel=1e-4, abs=1e-4)
    assert np.all(np.diff(errors[:5]) < 0)
    assert np.all(np.diff(errors) <= 1e-5 * errors[0])


@pytest.mark.parametrize("form", [iterative_dictionary, closed_form_dictionary])
def test_atoms_that_no_layer_uses_are_kept(form):
    metrics, products, codes, start, _ = equation(4, widths=(9, 8))
    for S in codes:
        S[2] = 0
    A = form(metrics, products, codes, start).dictionary
    np.testing.assert_allclose(A[:, 2], start[:, 2], atol=1e-12)
    assert np.abs(np.delete(A - start, 2, axis=1)).max() > 0.1
    zero = form(metrics, products, [0 * S for S in codes], start)
    np.testing.assert_array_equal(zero.dictionary, start)
    assert zero.residual == 0


def test_metrics_that_are_multiples_of_each_other_take_one_step():
    _, products, codes, start, _ = equation(5)
    metrics = [c * np.eye(7) for c in (0.5, 0.2, 0.3)]
    products = [M @ Z for M, Z in zip(metrics, products, strict=True)]
    assert iterative_dictionary(metrics, products, codes, start, tolerance=1e-6).steps == 1


def test_relative_metrics_sum_to_the_identity_and_keep_the_errors():
    given = problem(layer_weights=(3.0, 0.1), column_weights=(np.linspace(0, 2, 40), np.full(30, 7.0)))
    layers, upper = relative_layers(given)
    np.testing.assert_allclose(sum(la.metric for la in layers), np.eye(16), atol=1e-12)
    assert sum(la.share for la in layers) == pytest.approx(1)
    D = np.random.default_rng(1).standard_normal((16, 12))
    for layer, W, L, f, w in zip(
        layers, given.weights, given.factors, given.column_weights, given.layer_weights, strict=True
    ):
        S = np.random.default_rng(2).standard_normal((12, W.shape[1]))
        expected = w * float(((L.T @ (W - D @ S)) ** 2 * f).sum())
        assert layer.squared_error(upper @ D, S * layer.column_scales) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dictionary", ["iterative", "closed-form"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_exact_metrics_beat_the_averaged_one(dictionary, dtype):
    given = problem(dtype=dtype)
    solution = SharedHTP(dictionary=dictionary).solve(given)
    assert solution.objective < 0.97 * solution.start_objective
    assert objective(given, solution) == pytest.approx(solution.objective, rel=1e-4 if dtype == np.float32 else 1e-9)
    assert solution.dictionary.dtype == np.float64
    assert all(S.dtype == dtype for S in solution.coefficients)
    assert all((S != 0).sum(axis=0).max() <= 4 for S in solution.coefficients)
    for W, L, S, error in zip(
        given.weights, given.factors, solution.coefficients, solution.relative_errors, strict=True
    ):
        expected = np.linalg.norm(L.T @ (W - solution.dictionary @ S)) / np.linalg.norm(L.T @ W)
        assert error == pytest.approx(expected, rel=1e-4)


def test_both_dictionary_steps_reach_the_same_error():
    given = problem()
    closed = SharedHTP(dictionary="closed-form", n_iter=1).solve(given)
    exact = SharedHTP(dictionary_tolerance=1e-12, dictionary_steps=400, n_iter=1).solve(given)
    assert exact.statistics["dictionary_residual"] <= 1e-12
    assert exact.objective == pytest.approx(closed.objective, rel=1e-8)


def test_no_iterations_keep_the_solution_in_the_averaged_metric():
    given = problem()
    solution = SharedHTP(n_iter=0).solve(given)
    # By hand: one problem whitened by the sum of the Grams, weights of one size, each layer with its share of the sum.
    factors = [F * (W**2).mean() ** 0.5 for F, W in zip(given.factors, given.weights, strict=True)]
    L = np.linalg.cholesky(sum(F @ F.T for F in factors))
    shares = [np.trace(np.linalg.solve(L, np.linalg.solve(L, F @ F.T).T)) / 16 for F in factors]
    sizes = [(W**2).mean() ** 0.5 for W in given.weights]
    targets = [share**0.5 * L.T @ W / size for share, W, size in zip(shares, given.weights, sizes, strict=True)]
    plain = HTP().solve(Problem(np.concatenate(targets, axis=1), 12, 4))
    expected = np.linalg.solve(L.T, plain.dictionary @ plain.coefficients)[:, :40] * sizes[0] / shares[0] ** 0.5
    np.testing.assert_allclose(solution.dictionary @ solution.coefficients[0], expected, rtol=1e-6, atol=1e-7)
    assert solution.objective == solution.start_objective == pytest.approx(objective(given, solution))


def test_one_layer_is_ordinary_whitening():
    given = problem(widths=(60,))
    target = given.factors[0].T @ given.weights[0]

    def squared(n_iter):
        ordinary = HTP(n_iter=n_iter).solve(Problem(target, 12, 4))
        return float(((target - ordinary.dictionary @ ordinary.coefficients) ** 2).sum())

    shared = SharedHTP(start=HTP(n_iter=10), n_iter=10).solve(given)
    assert shared.start_objective == pytest.approx(squared(10), rel=1e-6)
    assert shared.objective == pytest.approx(squared(20), rel=0.02)
    assert shared.objective < squared(10)


def test_identical_layers_equal_one_layer():
    one = problem(widths=(60,))
    three = SharedProblem(one.weights * 3, one.factors * 3, 12, 4)
    alone, together = SharedHTP().solve(one), SharedHTP().solve(three)
    assert together.objective == pytest.approx(3 * alone.objective, rel=1e-6)
    for S in together.coefficients:
        np.testing.assert_allclose(together.dictionary @ S, alone.dictionary @ alone.coefficients[0], atol=1e-6)


def test_layers_with_one_metric_equal_one_wide_layer():
    L = factor(16, 0)
    W = np.random.default_rng(0).standard_normal((16, 70))
    wide = SharedHTP().solve(SharedProblem((W,), (L,), 12, 4))
    parts = SharedHTP().solve(SharedProblem((W[:, :50], W[:, 50:]), (L, L), 12, 4))
    together = np.concatenate(parts.coefficients, axis=1)
    # Only the first dictionary that each iteration starts from differs, by rounding.
    np.testing.assert_allclose(parts.dictionary @ together, wide.dictionary @ wide.coefficients[0], atol=1e-5)


def test_scaling_a_gram_a_layer_weight_or_its_columns_is_the_same():
    plain = problem()
    W, (first, second) = plain.weights, plain.factors
    f = (np.linspace(0.5, 1.5, 40), np.linspace(2, 1, 30))
    same = [
        SharedProblem(W, (3 * first, second), 12, 4, f),
        SharedProblem(W, (first, second), 12, 4, f, (9.0, 1.0)),
        SharedProblem(W, (first, second), 12, 4, (9 * f[0], f[1])),
        SharedProblem(W, (first, second @ np.linalg.qr(second)[0]), 12, 4, f, (9.0, 1.0)),  # another square root
        SharedProblem((3 * W[0], W[1]), (first, second), 12, 4, f),
    ]
    solutions = [SharedHTP(n_iter=5).solve(each) for each in same]
    for solution in solutions[1:]:
        assert solution.objective == pytest.approx(solutions[0].objective, rel=1e-6)
        size = 3 if solution is solutions[-1] else 1
        for S, T, c in zip(solution.coefficients, solutions[0].coefficients, (size, 1), strict=True):
            np.testing.assert_allclose(solution.dictionary @ S, c * solutions[0].dictionary @ T, atol=1e-5)


def test_weights_move_the_error_to_the_other_layer():
    errors = [
        SharedHTP().solve(problem(layer_weights=(w, 1.0), n_atoms=10, n_nonzero=3)).relative_errors
        for w in (0.01, 1.0, 100.0)
    ]
    assert errors[0][0] > errors[1][0] > errors[2][0]
    assert errors[0][1] < errors[1][1] < errors[2][1]


def test_a_planted_dictionary_is_found_where_the_averaged_metric_misses_it():
    """Each weight has a large part in a direction that its own inputs hardly take, but the other layer's do."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.standard_normal((10, 10)))[0]
    planted = directions[:, :3]
    weights, factors = [], []
    for index in (3, 4):
        silent = directions[:, index : index + 1]
        weights.append(planted @ rng.standard_normal((3, 40)) + 3 * silent @ rng.standard_normal((1, 40)))
        factors.append(np.linalg.cholesky(np.eye(10) - (1 - 1e-6) * silent @ silent.T))
    solution = SharedHTP(n_iter=60).solve(SharedProblem(tuple(weights), tuple(factors), 3, 3))
    assert solution.start_objective > 1
    assert solution.objective < 0.01


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 9),
    widths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    atoms=st.integers(1, 12),
    share=st.floats(0, 1),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 1000),
    zeros=st.sampled_from(["none", "column", "layer", "all", "duplicates"]),
)
def test_any_shape_is_never_worse_than_its_start(d, widths, atoms, share, dtype, seed, zeros):
    given = problem(d, widths, atoms, round(share * atoms), seed, dtype)
    weights = [W.copy() for W in given.weights]
    if zeros == "column":
        weights[0][:, 0] = 0
    elif zeros == "duplicates":
        weights[0][:] = weights[0][:, :1]
    elif zeros != "none":
        for W in weights[: 1 if zeros == "layer" else None]:
            W[:] = 0
    f = tuple(np.abs(np.random.default_rng(seed).standard_normal(n)) for n in widths)
    given = SharedProblem(tuple(weights), given.factors, atoms, round(share * atoms), f)
    before = [W.copy() for W in given.weights]
    solution = SharedHTP(n_iter=3).solve(given)
    assert solution.objective <= solution.start_objective
    total = sum(float(((L.T @ W) ** 2 * c).sum()) for W, L, c in zip(weights, given.factors, f, strict=True))
    assert objective(given, solution) == pytest.approx(solution.objective, rel=1e-3, abs=1e-5 * total + 1e-12)
    assert all((S != 0).sum(axis=0).max() <= given.n_nonzero for S in solution.coefficients)
    for W, kept in zip(given.weights, before, strict=True):
        np.testing.assert_array_equal(W, kept)
    again = SharedHTP(n_iter=3).solve(given)
    np.testing.assert_array_equal(again.dictionary, solution.dictionary)


def test_tensors_are_solved_like_arrays_and_come_back_as_tensors():
    given = problem(dtype=np.float32)
    tensors = SharedProblem(
        tuple(map(torch.from_numpy, given.weights)), tuple(map(torch.from_numpy, given.factors)), 12, 4
    )
    expected, solution = SharedHTP().solve(given), SharedHTP().solve(tensors)
    np.testing.assert_array_equal(solution.dictionary.numpy(), expected.dictionary)
    for S, T in zip(solution.coefficients, expected.coefficients, strict=True):
        np.testing.assert_array_equal(S.numpy(), T)
    half = SharedProblem(tuple(W.bfloat16() for W in tensors.weights), tensors.factors, 12, 4)
    assert SharedHTP().solve(half).coefficients[0].dtype == torch.float32


def test_the_pieces_run_on_tensors():
    """GPUs take tensors, which on the CPU are converted; here the pieces get them directly."""
    metrics, products, codes, start, expected = equation(6, widths=(9, 8))
    tensors = [[torch.from_numpy(array) for array in arrays] for arrays in (metrics, products, codes)]
    closed = closed_form_dictionary(*tensors, torch.from_numpy(start))
    iterative = iterative_dictionary(*tensors, torch.from_numpy(start), 1e-12, 200)
    np.testing.assert_allclose(closed.dictionary.numpy(), expected, atol=1e-8)
    np.testing.assert_allclose(iterative.dictionary.numpy(), expected, atol=1e-8)


def test_other_solvers_may_start():
    given = problem()
    solution = SharedHTP(start=MOD(n_iter=3)).solve(given)
    assert solution.start_objective == pytest.approx(SharedHTP(start=MOD(n_iter=3), n_iter=0).solve(given).objective)
    assert solution.objective < solution.start_objective


def test_a_bad_condition_costs_no_digits_that_matter():
    rng = np.random.default_rng(0)
    factors = tuple(factor(16, seed, decay=8.0) for seed in (0, 1))
    assert min(np.linalg.cond(L @ L.T) for L in factors) > 1e9
    weights = tuple(rng.standard_normal((16, 30)) for _ in factors)
    exact = SharedHTP(n_iter=3).solve(SharedProblem(weights, factors, 8, 4))
    single = SharedProblem(tuple(W.astype(np.float32) for W in weights), factors, 8, 4)
    solution = SharedHTP(n_iter=3).solve(single)
    assert objective(single, solution) == pytest.approx(solution.objective, rel=1e-3)
    total = sum(float(((L.T @ W) ** 2).sum()) for L, W in zip(factors, weights, strict=True))
    assert exact.objective < 1e-4 * total
    assert abs(solution.objective - exact.objective) < 1e-5 * total  # the ridge of the dictionary in float32


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weights": ()}, "equal input width"),
        ({"weights": (np.ones((4, 3)), np.ones((5, 3)))}, "equal input width, got shapes"),
        ({"factors": (np.eye(4),)}, "need as many factors of shape"),
        ({"n_nonzero": 9}, "0 <= n_nonzero <= n_atoms"),
        ({"column_weights": (np.ones(3), np.ones(4))}, "column_weights of shapes"),
        ({"layer_weights": (1.0, 0.0)}, "expected 2 positive numbers"),
        ({"layer_weights": (1.0,)}, "expected 2 positive numbers"),
    ],
)
def test_problems_that_make_no_sense_are_refused(change, text):
    sound = {"weights": (np.ones((4, 3)),) * 2, "factors": (np.eye(4),) * 2, "n_atoms": 3, "n_nonzero": 1}
    with pytest.raises(UsageError, match=text):
        SharedProblem(**{**sound, **change})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_iter": -1}, "n_iter=-1"),
        ({"dictionary_tolerance": float("nan")}, "dictionary_tolerance=nan"),
        ({"dictionary": "exact"}, "'iterative' or 'closed-form'"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(UsageError, match=text):
        SharedHTP(**options)


def test_the_closed_form_is_for_two_layers():
    with pytest.raises(UsageError, match="for two layers, these are 3"):
        SharedHTP(dictionary="closed-form").solve(problem(widths=(20, 20, 20)))


@pytest.mark.parametrize("part", ["weights", "factors", "column_weights"])
def test_numbers_that_are_not_finite_are_refused(part):
    given = problem(column_weights=(np.ones(40), np.ones(30)))
    arrays = [array.copy() for array in getattr(given, part)]
    arrays[1].flat[0] = np.nan
    with pytest.raises(NumericalError, match="NaN or infinity"):
        SharedHTP().solve(SharedProblem(**{**vars(given), part: tuple(arrays)}))


def test_singular_factors_and_negative_weights_are_refused():
    given = problem()
    with pytest.raises(NumericalError, match="singular"):
        SharedHTP().solve(SharedProblem(given.weights, (np.zeros((16, 16)),) * 2, 12, 4))
    with pytest.raises(NumericalError, match="not be negative"):
        SharedHTP().solve(SharedProblem(given.weights, given.factors, 12, 4, (-np.ones(40), np.ones(30))))
