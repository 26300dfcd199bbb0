"""Warm-started coding, the schedule of the pursuit, starts and polish of the alternating solvers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import UsageError
from cospadi.solvers.alternating import initial_dictionary
from cospadi.solvers.base import SOLVERS
from cospadi.solvers.coders import BatchOMP, GeneralizedOMP
from cospadi.solvers.exchange import better_columns, exchange_atoms, least_squares_refit, polished, pursuit_pays
from cospadi.solvers.htp import HTP
from cospadi.solvers.ksvd import NumpyKSVD, TorchKSVD
from cospadi.solvers.mod import MOD
from cospadi.solvers.updates import hard_threshold, squared_columns
from cospadi.whitening.problem import Problem
from tests.helpers_solvers import as_library, error, planted, product, unit, whitened_like

PAPER = {"block": 1, "power_iterations": 8, "pursue_every": 1}


def warm(Y, A, S, n_nonzero, relaxation=1.4, cg_steps=2):
    residual = Y - A @ S
    candidate = exchange_atoms(A, S, residual, n_nonzero, relaxation, cg_steps)
    return better_columns(Y, A, S, residual, squared_columns(residual), candidate)[:2]


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 30),
    n=st.integers(1, 40),
    k=st.integers(1, 40),
    part=st.floats(0, 1),
    relaxation=st.floats(0.1, 8),
    cg_steps=st.integers(0, 5),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_no_column_gets_worse(d, n, k, part, relaxation, cg_steps, dtype, seed):
    rng = np.random.default_rng(seed)
    s = int(part * k)
    A, Y = unit(rng.standard_normal((d, k))), whitened_like(d, n, seed)
    A[:, -1] = -A[:, 0]
    A[:, k // 2] = 0
    Y[:, n // 2] = 0
    S = hard_threshold(rng.standard_normal((k, n)), s)
    S[:, n // 2] = 0
    S[k // 2] = 0
    Y, A, S = (array.astype(dtype) for array in (Y, A, S))
    kept = Y.copy(), A.copy(), S.copy()
    S1, residual = warm(Y, A, S, s, relaxation=relaxation, cg_steps=cg_steps)
    for array, before in zip((Y, A, S), kept, strict=True):
        np.testing.assert_array_equal(array, before)
    assert np.all(np.isfinite(S1))
    assert S1.dtype == dtype
    assert np.count_nonzero(S1, axis=0).max() <= s
    assert not S1[:, n // 2].any()
    assert np.all(squared_columns(residual) <= squared_columns(Y - A @ S))
    np.testing.assert_allclose(residual, Y - A @ S1, atol=1e3 * np.finfo(dtype).eps * (1 + np.abs(S).max()))


def test_an_exact_step_codes_orthonormal_atoms_from_any_support():
    rng = np.random.default_rng(0)
    A, Y = np.linalg.qr(rng.standard_normal((20, 12)))[0], rng.standard_normal((20, 30))
    S = hard_threshold(rng.standard_normal((12, 30)), 4)
    S1, _ = warm(Y, A, S, 4, relaxation=1.0, cg_steps=1)
    np.testing.assert_allclose(S1, hard_threshold(A.T @ Y, 4), atol=1e-12)


def test_the_exchange_finds_a_planted_support_and_stays_there():
    rng = np.random.default_rng(1)
    A = unit(rng.standard_normal((60, 80)))
    truth = hard_threshold(rng.standard_normal((80, 50)), 4)
    truth += 0.5 * np.sign(truth)
    Y = A @ truth
    # one of the four atoms of each column is wrong
    S = truth.copy()
    for j in range(50):
        S[np.flatnonzero(truth[:, j])[0], j] = 0
        S[np.flatnonzero(truth[:, j] == 0)[j % 40], j] = 0.3
    for _ in range(3):
        S, _ = warm(Y, A, S, 4, cg_steps=6)
    np.testing.assert_allclose(S, truth, atol=1e-6)


def test_exchanges_follow_permutations_and_scales():
    rng = np.random.default_rng(2)
    A, Y = unit(rng.standard_normal((20, 30))), whitened_like(20, 40, seed=2)
    S = BatchOMP().encode(A, Y, 5).coefficients
    Y = Y + 0.1 * rng.standard_normal(Y.shape)
    expected, _ = warm(Y, A, S, 5)
    columns, atoms = rng.permutation(40), rng.permutation(30)
    permuted, _ = warm(Y[:, columns], A[:, atoms], S[np.ix_(atoms, columns)], 5)
    np.testing.assert_allclose(permuted, expected[np.ix_(atoms, columns)], atol=1e-10)
    scales = 2.0 ** rng.integers(-20, 20, 40)
    scaled, _ = warm(Y * scales, A, S * scales, 5)
    np.testing.assert_allclose(scaled, expected * scales, rtol=1e-9)


def test_the_trial_prefers_the_pursuit_for_coherent_atoms_only():
    Y, _ = planted(16, 600, 20, 3, seed=3)
    # random columns of the target, and a support that fits another dictionary
    A = initial_dictionary(Y, 20, 3, "columns", 0)
    S = hard_threshold(A.T @ Y, 3)
    assert pursuit_pays(Y, A, S, Y - A @ S, 3, BatchOMP(), 1.4, 2)
    Y = whitened_like(32, 200, seed=3)
    A = initial_dictionary(Y, 24, 12, "svd", 0)
    S = hard_threshold(A.T @ Y, 12)
    assert not pursuit_pays(Y, A, S, Y - A @ S, 12, BatchOMP(), 1.4, 2)


@pytest.mark.parametrize("alternations", [0, 1, 6])
def test_polish_never_raises_the_error_and_pays(alternations):
    Y = whitened_like(24, 120, seed=4)
    A = initial_dictionary(Y, 20, 7, "svd", 0)
    S = hard_threshold(A.T @ Y, 7) * 0.9
    A1, S1 = polished(Y, A, S, 7, alternations, 2)
    assert np.linalg.norm(Y - A1 @ S1) < np.linalg.norm(Y - A @ S)
    assert np.count_nonzero(S1, axis=0).max() <= 7
    A2, S2 = polished(Y, A1, S1, 7, alternations, 2)
    assert np.linalg.norm(Y - A2 @ S2) <= np.linalg.norm(Y - A1 @ S1) * (1 + 1e-12)


def test_a_least_squares_refit_that_would_cost_is_not_taken():
    Y, A = planted(10, 200, 8, 2, seed=5)
    S = BatchOMP().encode(A, Y, 2).coefficients
    A1, S1, residual = least_squares_refit(Y, A, S, Y - A @ S)
    assert np.linalg.norm(Y - A1 @ S1) <= np.linalg.norm(Y - A @ S)
    np.testing.assert_allclose(residual, Y - A1 @ S1, atol=1e-12)


def paper_recipe(Y, k, s, n_iter, init, seed):
    """Pursuit and eight power steps per atom in turns; a column keeps its code where the new one is no better."""
    A = initial_dictionary(Y, k, s, init, seed).copy()
    S = BatchOMP().encode(A, Y, s).coefficients.copy()
    for iteration in range(n_iter):
        if iteration:
            fresh = BatchOMP().encode(A, Y, s).coefficients
            better = np.linalg.norm(Y - A @ fresh, axis=0) < np.linalg.norm(Y - A @ S, axis=0)
            S[:, better] = fresh[:, better]
        for i in range(k):
            used = np.flatnonzero(S[i])
            E = Y[:, used] - A @ S[:, used] + np.outer(A[:, i], S[i, used])
            for _ in range(8):
                A[:, i] = unit(E @ (E.T @ A[:, i]))
            S[i, used] = E.T @ A[:, i]
    return A @ S


@pytest.mark.parametrize("init", ["svd", "columns"])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_recipe_of_the_paper_is_what_it_was(init, compiled):
    Y = whitened_like(12, 90, seed=6)
    solver = NumpyKSVD(**PAPER, n_iter=5, init=init, tolerance=0, compiled=compiled)
    solution = solver.solve(Problem(Y, 10, 3, seed=1))
    assert solution.statistics["replaced_atoms"] == 0
    np.testing.assert_allclose(product(solution), paper_recipe(Y, 10, 3, 5, init, 1), atol=1e-8)
    assert solution.statistics["pursuits"] == 5


@pytest.mark.parametrize(
    ("d", "n", "k", "s", "limit"), [(64, 256, 48, 24, 1.005), (64, 256, 80, 40, 1.0), (96, 384, 90, 23, 1.02)]
)
def test_the_default_is_as_good_as_the_recipe_of_the_paper(d, n, k, s, limit):
    Y = whitened_like(d, n, seed=7)
    slow = NumpyKSVD(**PAPER, n_iter=15, tolerance=0).solve(Problem(Y, k, s))
    fast = NumpyKSVD(n_iter=15, tolerance=0).solve(Problem(Y, k, s))
    assert error(Y, fast) <= error(Y, slow) * limit
    assert fast.statistics["pursuits"] < slow.statistics["pursuits"]


def test_the_relaxation_adapts_to_how_often_exchanges_pay():
    Y = whitened_like(48, 200, seed=12)
    fixed = [
        error(Y, NumpyKSVD(n_iter=15, pursue_every=0, relaxation=r, acceptance=0.0).solve(Problem(Y, 40, 14)))
        for r in (0.5, 6.0)
    ]
    adapted = [
        error(Y, NumpyKSVD(n_iter=15, pursue_every=0, relaxation=r).solve(Problem(Y, 40, 14))) for r in (0.5, 6.0)
    ]
    assert adapted[0] < fixed[0]
    assert adapted[1] < fixed[1]


@pytest.mark.parametrize("within", ["joint", "sequence"])
@pytest.mark.parametrize("options", [{"pursue_every": 1}, {}])
def test_blocks_recover_a_planted_dictionary(within, options):
    Y, truth = planted(16, 1500, 20, 3, seed=7)
    solver = NumpyKSVD(n_iter=60, init="columns", tolerance=0, within=within, block=8, **options)
    matches = np.abs(truth.T @ solver.solve(Problem(Y, 20, 3, seed=1)).dictionary).max(axis=1)
    assert np.count_nonzero(matches > 0.99) >= 16


@pytest.mark.parametrize(
    "options",
    [
        {"within": "sequence"},
        {"pursue_every": 0},
        {"pursue_every": 3, "power_iterations": 2},
        {"init": "htp"},
        {"init": "columns", "polish": "cg"},
        {"polish": "htp", "block": 4},
        {"coder": "gomp", "pursue_every": 1},
    ],
    ids=str,
)
def test_the_options_hold_the_laws(options):
    Y = whitened_like(16, 60, seed=8)
    errors = []
    for n_iter in (1, 3, 8):
        solution = NumpyKSVD(n_iter=n_iter, tolerance=0, **options).solve(Problem(Y, 12, 4, seed=2))
        assert np.count_nonzero(solution.coefficients, axis=0).max() <= 4
        np.testing.assert_allclose(np.linalg.norm(solution.dictionary, axis=0), 1, rtol=1e-9)
        errors.append(error(Y, solution))
    if "polish" not in options:
        assert np.all(np.diff(errors) <= 1e-12)
    assert errors[-1] < errors[0]
    order = np.random.default_rng(3).permutation(60)
    solver = NumpyKSVD(n_iter=3, **options)
    if options.get("init") != "columns":
        permuted = solver.solve(Problem(Y[:, order], 12, 4, seed=2))
        np.testing.assert_allclose(product(permuted), product(solver.solve(Problem(Y, 12, 4)))[:, order], atol=1e-7)
    scaled = solver.solve(Problem(Y * 2.0**-30, 12, 4, seed=2))
    np.testing.assert_allclose(product(scaled) * 2.0**30, product(solver.solve(Problem(Y, 12, 4, seed=2))), atol=1e-9)
    torch = TorchKSVD(n_iter=3, **options)._factorize(as_library(Y, "torch"), 12, 4, 2)
    np.testing.assert_allclose(product(torch), product(solver.solve(Problem(Y, 12, 4, seed=2))), atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 12),
    n=st.integers(1, 30),
    k=st.integers(1, 30),
    part=st.floats(0, 1),
    init=st.sampled_from(["svd", "columns", "htp"]),
    within=st.sampled_from(["joint", "sequence"]),
    polish=st.sampled_from(["none", "cg", "htp"]),
    seed=st.integers(0, 99),
)
def test_any_sizes_work(d, n, k, part, init, within, polish, seed):
    rng = np.random.default_rng(seed)
    Y = whitened_like(d, n, seed).astype(np.float32)
    Y[:, rng.integers(n)] = 0
    Y[:, rng.integers(n)] = Y[:, rng.integers(n)]
    s = int(part * k)
    solver = NumpyKSVD(n_iter=4, init=init, within=within, polish=polish, block=5)
    solution = solver.solve(Problem(Y, k, s, seed=seed))
    assert solution.dictionary.shape == (d, k)
    assert solution.coefficients.shape == (k, n)
    assert np.count_nonzero(solution.coefficients, axis=0).max() <= s
    assert error(Y, solution) <= 1 + 1e-5


def test_from_htp_and_polished_by_htp_nothing_is_lost():
    Y = whitened_like(32, 160, seed=9)
    htp = error(Y, HTP().solve(Problem(Y, 24, 10)))
    started = NumpyKSVD(n_iter=8, init="htp").solve(Problem(Y, 24, 10))
    assert error(Y, started) < htp
    plain = error(Y, NumpyKSVD(n_iter=8).solve(Problem(Y, 24, 10)))
    refined = error(Y, NumpyKSVD(n_iter=8, polish="cg").solve(Problem(Y, 24, 10)))
    polished_by_htp = error(Y, NumpyKSVD(n_iter=8, polish="htp").solve(Problem(Y, 24, 10)))
    assert polished_by_htp < refined <= plain


def test_mod_takes_the_exchange_too():
    Y = whitened_like(24, 120, seed=10)
    errors = [error(Y, MOD(n_iter=i, pursue_every=0, tolerance=0).solve(Problem(Y, 18, 6))) for i in (1, 4, 12)]
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("library", ["numpy", "torch", "strict"])
def test_generalized_pursuit_with_one_atom_per_step_is_orthogonal_matching_pursuit(library):
    rng = np.random.default_rng(11)
    A, Y = unit(rng.standard_normal((40, 60))), rng.standard_normal((40, 30))
    coder = GeneralizedOMP(atoms_per_step=1, cg_steps=60, final_cg_steps=60)
    S = np.asarray(coder.encode(as_library(A, library), as_library(Y, library), 10).coefficients)
    np.testing.assert_allclose(S, BatchOMP().encode(A, Y, 10).coefficients, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    d=st.integers(1, 30),
    k=st.integers(1, 40),
    part=st.floats(0, 1),
    step=st.integers(1, 20),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 99),
)
def test_generalized_pursuit_never_raises_the_error(d, k, part, step, dtype, seed):
    rng = np.random.default_rng(seed)
    A, Y = unit(rng.standard_normal((d, k))).astype(dtype), rng.standard_normal((d, 20)).astype(dtype)
    A[:, -1] = A[:, 0]
    A[:, k // 2] = 0
    Y[:, 3] = 0
    s = int(part * k)
    S = GeneralizedOMP(atoms_per_step=step).encode(A, Y, s).coefficients
    assert np.count_nonzero(S, axis=0).max() <= s
    assert not S[k // 2].any()
    assert not S[:, 3].any()
    limit = np.linalg.norm(Y, axis=0) * (1 + 100 * np.finfo(dtype).eps)
    assert np.all(np.linalg.norm(Y - A @ S, axis=0) <= limit)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pursue_every": -1}, "pursue_every=-1"),
        ({"pursue_every": "often"}, "pursue_every"),
        ({"relaxation": 0.0}, r"relaxation=0\.0"),
        ({"relaxation": float("nan")}, "relaxation=nan"),
        ({"acceptance": 1.0}, r"acceptance=1\.0"),
        ({"cg_steps": -2}, "cg_steps=-2"),
        ({"polish": "omp"}, "polish"),
        ({"block": 0}, "block=0"),
        ({"within": "parallel"}, "within"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(UsageError, match=match):
        SOLVERS.create("ksvd-numpy", options)


def test_options_given_as_text_become_typed():
    assert SOLVERS.create("ksvd-numpy", {"pursue_every": "5", "block": "16", "acceptance": "0"}).pursue_every == 5
    assert SOLVERS.create("mod", {"pursue_every": "auto"}).pursue_every == "auto"
    with pytest.raises(UsageError, match="atoms_per_step=0"):
        GeneralizedOMP(atoms_per_step=0)
