"""K-SVD and MOD: the atom updates, the alternation, and the paths that must agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.solvers.alternating import initial_dictionary
from cospadi.solvers.base import Status
from cospadi.solvers.coders import BatchOMP, SklearnOMP
from cospadi.solvers.kernels import update_atoms
from cospadi.solvers.ksvd import NumpyKSVD, TorchKSVD, update_atoms_arrays
from cospadi.solvers.mod import MOD
from cospadi.whitening.problem import Problem
from tests.helpers_solvers import StrictKSVD, as_library, error, planted, product, unit, whitened_like


def coded(d=12, n=70, k=9, s=3, seed=0):
    """A target, a dictionary and coefficients that do not fit well yet."""
    rng = np.random.default_rng(seed)
    Y, A = whitened_like(d, n, seed), unit(rng.standard_normal((d, k)))
    return Y, A, np.ascontiguousarray(BatchOMP().encode(A, Y, s).coefficients)


def run_kernel(Y, A, S, steps):
    residual, atoms, coefficients = (np.array(a, order="C") for a in ((Y - A @ S).T, A.T, S))
    update_atoms(residual, atoms, coefficients, steps)
    return atoms.T, coefficients, residual.T


def reference_update(Y, A, S):
    """The rank-one SVD of each atom's restricted residual, one atom after the other."""
    A, S = A.copy(), S.copy()
    for i in range(A.shape[1]):
        used = np.flatnonzero(S[i])
        if used.size:
            E = Y[:, used] - A @ S[:, used] + np.outer(A[:, i], S[i, used])
            left, values, right = np.linalg.svd(E, full_matrices=False)
            A[:, i], S[i, used] = left[:, 0], values[0] * right[0]
    return A, S


@pytest.mark.parametrize("path", ["compiled", "arrays"])
def test_with_many_power_steps_each_atom_is_the_rank_one_svd(path):
    Y, A, S = coded()
    expected = np.matmul(*reference_update(Y, A, S))
    residual = Y - A @ S
    got = run_kernel(Y, A, S, 4000) if path == "compiled" else update_atoms_arrays(A, S, residual, 4000)
    np.testing.assert_allclose(got[0] @ got[1], expected, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(1, 40),
    n=st.integers(1, 90),
    k=st.integers(1, 12),
    s=st.integers(0, 4),
    steps=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_an_atom_update_never_raises_the_error_and_keeps_the_support(d, n, k, s, steps, seed):
    Y, A, S = coded(d, n, k, min(s, k), seed)
    S[0] = 0
    before = np.linalg.norm(Y - A @ S)
    A1, S1, residual = run_kernel(Y, A, S, steps)
    assert np.linalg.norm(Y - A1 @ S1) <= before * (1 + 1e-12)
    np.testing.assert_allclose(residual, Y - A1 @ S1, atol=1e-12)
    np.testing.assert_array_equal(S1 == 0, (S == 0) | (S1 == 0))
    np.testing.assert_allclose(np.linalg.norm(A1, axis=0), 1, rtol=1e-12)
    np.testing.assert_array_equal(A1[:, 0], A[:, 0])
    A2, S2, residual2 = update_atoms_arrays(A, S, Y - A @ S, steps)
    np.testing.assert_allclose(A2 @ S2, A1 @ S1, atol=1e-9)
    np.testing.assert_allclose(residual2, residual, atol=1e-9)


def test_the_compiled_update_does_not_depend_on_the_thread_count():
    import numba

    rng = np.random.default_rng(3)
    # enough residual entries on each atom to be shared among the threads
    Y, A = rng.standard_normal((640, 2000)).astype(np.float32), unit(rng.standard_normal((640, 3))).astype(np.float32)
    S = (A.T @ Y).copy()
    used, results = numba.get_num_threads(), []
    try:
        for threads in (1, used):
            numba.set_num_threads(threads)
            results.append([part.tobytes() for part in run_kernel(Y, A, S, 2)])
    finally:
        numba.set_num_threads(used)
    assert results[0] == results[1]


@pytest.mark.parametrize("init", ["svd", "columns"])
@pytest.mark.parametrize("k", [8, 20])
def test_all_arrays_and_both_paths_give_the_same_numbers(init, k):
    Y = whitened_like(12, 60, seed=4)
    expected = product(NumpyKSVD(n_iter=4, init=init).solve(Problem(Y, k, 3, seed=5)))
    others = {
        "numpy arrays": (NumpyKSVD(n_iter=4, init=init, compiled=False, coder=BatchOMP(compiled=False)), Y),
        "torch": (TorchKSVD(n_iter=4, init=init), as_library(Y, "torch")),
        "torch of numpy": (TorchKSVD(n_iter=4, init=init), Y),
        "torch arrays": (TorchKSVD(n_iter=4, init=init, compiled=False, coder=BatchOMP(compiled=False)), Y),
        "strict": (StrictKSVD(n_iter=4, init=init), as_library(Y, "strict")),
        "scikit-learn's pursuit": (NumpyKSVD(n_iter=4, init=init, coder=SklearnOMP()), Y),
    }
    for label, (solver, target) in others.items():
        got = product(solver.solve(Problem(target, k, 3, seed=5)))
        np.testing.assert_allclose(got, expected, atol=1e-7, err_msg=label)


@pytest.mark.parametrize("solver", [NumpyKSVD, MOD])
@pytest.mark.parametrize("coder", ["omp", "spams", "threshold"])
def test_the_error_never_rises_with_more_alternations(solver, coder):
    if coder == "spams":
        pytest.importorskip("spams")
    Y = whitened_like(16, 80, seed=6)
    errors = [
        error(Y, solver(n_iter=i, tolerance=0, coder=coder, init="columns").solve(Problem(Y, 12, 4)))
        for i in range(1, 9)
    ]
    assert np.all(np.diff(errors) <= 1e-12)
    assert errors[-1] < errors[0]


def test_a_planted_dictionary_is_recovered():
    Y, truth = planted(16, 1500, 20, 3, seed=7)
    solution = NumpyKSVD(n_iter=60, init="columns", tolerance=0).solve(Problem(Y, 20, 3, seed=1))
    matches = np.abs(truth.T @ solution.dictionary).max(axis=1)
    assert np.count_nonzero(matches > 0.99) >= 17
    np.testing.assert_allclose(np.linalg.norm(solution.dictionary, axis=0), 1, rtol=1e-9)


@pytest.mark.parametrize("solver", [NumpyKSVD, MOD])
def test_a_tolerance_stops_early_and_zero_does_not(solver):
    Y = whitened_like(16, 80, seed=8)
    loose = solver(n_iter=50, tolerance=0.02).solve(Problem(Y, 12, 4))
    assert loose.status is Status.CONVERGED
    assert loose.statistics["iterations"] < 50
    full = solver(n_iter=12, tolerance=0).solve(Problem(Y, 12, 4))
    assert full.status is Status.MAX_ITERATIONS
    assert full.statistics["iterations"] == 12


def test_idle_and_duplicate_atoms_are_replaced_and_counted():
    # Two directions hold nearly everything: random columns are near duplicates, so atoms fall idle.
    rng = np.random.default_rng(9)
    Y = rng.standard_normal((10, 2)) @ rng.choice([-1.0, 1.0], (2, 60)) + 1e-4 * rng.standard_normal((10, 60))
    one = NumpyKSVD(n_iter=1, init="columns").solve(Problem(Y, 8, 2))
    many = NumpyKSVD(n_iter=15, init="columns", tolerance=0).solve(Problem(Y, 8, 2))
    assert many.statistics["replaced_atoms"] > 0
    assert error(Y, many) < error(Y, one)


@pytest.mark.parametrize(("n", "k"), [(30, 6), (4, 6), (4, 20), (30, 20)])
@pytest.mark.parametrize("init", ["svd", "columns"])
def test_the_first_dictionary_has_unit_atoms_for_any_sizes(init, n, k):
    Y = whitened_like(8, n, seed=10)
    Y[:, 1] = 0
    A = initial_dictionary(Y, k, 3, init, seed=2)
    assert A.shape == (8, k)
    norms = np.linalg.norm(A, axis=0)
    np.testing.assert_allclose(norms[norms > 0], 1)
    # a zero atom only where directions and non-zero columns together are too few
    assert np.count_nonzero(norms) >= min(k, 8 + n - 1)
    if init == "columns":
        assert np.abs(unit(Y[:, [0]]).T @ initial_dictionary(Y, min(k, n - 1), 3, init, seed=0)).max() <= 1 + 1e-12
        first, second = (initial_dictionary(whitened_like(8, 30), 6, 3, init, seed=s) for s in (0, 1))
        assert not np.array_equal(first, second)
    np.testing.assert_array_equal(A, initial_dictionary(Y, k, 3, init, seed=2))


def test_mod_refits_to_the_least_squares_dictionary():
    Y = whitened_like(12, 60, seed=11)
    solution = MOD(n_iter=3).solve(Problem(Y, 9, 3))
    S = solution.coefficients
    best = np.linalg.lstsq(S.T, Y.T, rcond=None)[0].T
    assert np.linalg.norm(Y - solution.dictionary @ S) == pytest.approx(np.linalg.norm(Y - best @ S), rel=1e-9)


def test_importing_ksvd_does_not_load_numba():
    import subprocess
    import sys

    code = "import sys, cospadi.solvers.ksvd, cospadi.solvers.htp; assert 'numba' not in sys.modules, 'numba is loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)
