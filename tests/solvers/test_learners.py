"""What belongs to one learner: SVD, orthogonal, single step, HTP, SPAMS."""

import numpy as np
import pytest

from cospadi.errors import UnavailableError
from cospadi.solvers import coders
from cospadi.solvers.base import SOLVERS
from cospadi.solvers.conjugate_gradients import conjugate_gradients
from cospadi.solvers.htp import HTP
from cospadi.solvers.orthogonal import Orthogonal
from cospadi.solvers.single_step import SingleStep
from cospadi.solvers.svd import SVD
from cospadi.whitening.problem import Problem
from tests.helpers_solvers import as_library, error, product, unit, whitened_like


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_svd_is_the_truncated_svd(shape):
    Y = whitened_like(*shape)
    solution = SVD().solve(Problem(Y, 5, 5))
    left, values, right = np.linalg.svd(Y, full_matrices=False)
    np.testing.assert_allclose(product(solution), (left[:, :5] * values[:5]) @ right[:5], atol=1e-9)
    np.testing.assert_allclose(solution.dictionary.T @ solution.dictionary, np.eye(5), atol=1e-10)


def test_the_orthogonal_dictionary_is_orthonormal_and_its_error_falls():
    Y = whitened_like(16, 60)
    errors = []
    for n_iter in range(6):
        solution = Orthogonal(n_iter=n_iter).solve(Problem(Y, 12, 4))
        np.testing.assert_allclose(solution.dictionary.T @ solution.dictionary, np.eye(12), atol=1e-10)
        errors.append(error(Y, solution))
    assert np.all(np.diff(errors) < 0)


def test_the_single_step_dictionary_is_optimal_for_its_coefficients():
    Y = whitened_like(16, 60)
    solution = SingleStep().solve(Problem(Y, 12, 4))
    best = np.linalg.lstsq(solution.coefficients.T, Y.T, rcond=None)[0].T
    np.testing.assert_allclose(solution.dictionary, best, atol=1e-7)


def test_conjugate_gradients_reach_least_squares_on_the_support():
    rng = np.random.default_rng(0)
    A, Y = unit(rng.standard_normal((20, 12))), rng.standard_normal((20, 30))
    S = rng.standard_normal((12, 30)) * (rng.random((12, 30)) < 0.4)
    S[:, 3] = 0
    G = A.T @ A
    errors = []
    for steps in range(13):
        T = conjugate_gradients(G, A.T @ Y - G @ S, S, steps)
        np.testing.assert_array_equal(T != 0, S != 0)
        errors.append(np.linalg.norm(Y - A @ T, axis=0))
    assert np.all(np.diff(errors, axis=0) < 1e-12)
    gradient = (A.T @ (Y - A @ T)) * (S != 0)
    assert np.abs(gradient).max() < 1e-8


@pytest.mark.parametrize("start", ["single-step", "orthogonal"])
@pytest.mark.parametrize("k", [12, 20])
def test_htp_iterations_pay_and_never_end_worse(start, k):
    Y = whitened_like(16, 80)
    errors = [error(Y, HTP(n_iter=i, start=start).solve(Problem(Y, k, 5))) for i in (0, 5, 15, 40)]
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    assert errors[3] <= errors[2] * (1 + 1e-3)


@pytest.mark.parametrize("solver", [HTP(), Orthogonal(), SingleStep(), SVD(), HTP(start="orthogonal")], ids=repr)
def test_numpy_torch_and_strict_arrays_agree(solver):
    Y = whitened_like(12, 50, seed=1)
    k, s = (9, 4) if solver.sparse else (9, 9)
    expected = product(solver.solve(Problem(Y, k, s)))
    strict = solver.solve(Problem(as_library(Y, "strict"), k, s))
    np.testing.assert_allclose(product(strict), expected, atol=1e-8)
    # On the CPU tensors are solved as numpy arrays; GPUs take the tensors themselves, here without the base class.
    torch_solution = solver._factorize(as_library(Y, "torch"), k, s, 0)
    np.testing.assert_allclose(product(torch_solution), expected, atol=1e-8)


def test_htp_with_more_atoms_than_dimensions_agrees_between_libraries():
    Y = whitened_like(12, 50, seed=2)
    expected = product(HTP().solve(Problem(Y, 18, 4, seed=1)))
    np.testing.assert_allclose(product(HTP()._factorize(as_library(Y, "torch"), 18, 4, 1)), expected, atol=1e-7)
    np.testing.assert_allclose(product(HTP()._factorize(as_library(Y, "strict"), 18, 4, 1)), expected, atol=1e-7)


@pytest.mark.parametrize("method", ["omp", "trainDL"])
def test_spams_learns_better_than_its_start(method):
    pytest.importorskip("spams")
    Y = whitened_like(16, 80, seed=3)
    solution = SOLVERS.create("spams", {"method": method, "n_iter": 10}).solve(Problem(Y, 12, 4))
    assert np.count_nonzero(solution.coefficients, axis=0).max() <= 4
    start = SOLVERS.create("single-step").solve(Problem(Y, 12, 4))
    assert error(Y, solution) < error(Y, start)


def test_without_spams_the_reason_names_the_package(monkeypatch):
    import importlib.util
    import sys

    monkeypatch.setitem(sys.modules, "spams", None)
    with pytest.raises(UnavailableError, match=r"pip install 'cospadi\[spams\]'"):
        coders.load_spams()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    state = SOLVERS.availability("spams")
    assert not state
    assert "cospadi[spams]" in state.reason
