"""Laws that hold for every registered solver."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.solvers.base import SOLVERS, relative_error
from cospadi.whitening.problem import Problem
from tests.helpers_solvers import NAMES, OVERCOMPLETE, SPARSE, error, product, solve, solver, whitened_like

LEAST_SQUARES = [name for name in NAMES if name != "orthogonal"]


def test_every_built_in_solver_is_registered_and_only_cupy_may_be_missing():
    expected = {
        "auto",
        "htp",
        "admm",
        "ksvd-numpy",
        "ksvd-torch",
        "mod",
        "orthogonal",
        "single-step",
        "svd",
        "sklearn",
        "spams",
    }
    assert expected <= set(NAMES)
    state = SOLVERS.availability("ksvd-cupy")
    assert state or "cupy" in state.reason


@pytest.mark.gpu
def test_ksvd_on_cupy_agrees_with_numpy():
    state = SOLVERS.availability("ksvd-cupy")
    if not state:
        pytest.skip(state.reason)
    target = whitened_like(12, 30)
    np.testing.assert_allclose(
        product(SOLVERS.create("ksvd-cupy", {"n_iter": 2}).solve(Problem(target, 8, 3))),
        product(SOLVERS.create("ksvd-numpy", {"n_iter": 2}).solve(Problem(target, 8, 3))),
        atol=1e-9,
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(
    d=st.integers(1, 14),
    n=st.integers(1, 20),
    k=st.integers(1, 18),
    part=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    kind=st.sampled_from(["full", "zero", "zero columns", "rank one", "equal columns", "tiny", "large"]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
@example(d=1, n=2, k=3, part=0.0, kind="full", dtype=np.float32)  # two more atoms than directions, none in use
@example(d=12, n=5, k=18, part=0.5, kind="large", dtype=np.float64)  # atoms with next to nothing to code
@pytest.mark.filterwarnings("error")
def test_any_shape_gives_finite_arrays_of_the_right_shape_within_the_sparsity(name, d, n, k, part, kind, dtype):
    target = whitened_like(d, n, seed=d + 31 * n, dtype=dtype)
    if kind == "zero":
        target = np.zeros_like(target)
    elif kind == "zero columns":
        target[:, ::2] = 0
    elif kind == "rank one":
        target = np.outer(target[:, 0], target[0])
    elif kind == "equal columns":
        target = np.repeat(target[:, :1], n, axis=1)
    elif kind in ("tiny", "large"):
        target = target * dtype(1e-8 if kind == "tiny" else 1e6)
    s = round(part * k)
    limit = {"orthogonal": d, "svd": min(d, n)}.get(name, k)
    if k > limit:
        with pytest.raises(UsageError, match=str(k)):
            solve(name, target, k, s)
        return
    before = target.copy()
    solution = solve(name, target, k, s)
    assert solution.dictionary.shape == (d, k)
    assert solution.coefficients.shape == (k, n)
    assert solution.dictionary.dtype == solution.coefficients.dtype == target.dtype
    if name in SPARSE:
        assert np.count_nonzero(solution.coefficients, axis=0).max() <= s
    np.testing.assert_array_equal(target, before)
    # Zero coefficients have relative error one: no solver may do worse.
    assert error(target, solution) <= 1 + 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_repetition_gives_the_same_bytes(name):
    target = whitened_like(20, 48, dtype=np.float32)
    first, second = solve(name, target, 16, 6, seed=3), solve(name, target, 16, 6, seed=3)
    assert first.dictionary.tobytes() == second.dictionary.tobytes()
    assert first.coefficients.tobytes() == second.coefficients.tobytes()
    assert first.statistics == second.statistics


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [-20, 3, 20])
def test_scaling_the_target_scales_the_product(name, power):
    target = whitened_like(14, 30, seed=1)
    scaled = solve(name, target * 2.0**power, 10, 4)
    np.testing.assert_allclose(product(scaled) / 2.0**power, product(solve(name, target, 10, 4)), atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_columns_permutes_the_product(name):
    target = whitened_like(14, 30, seed=2)
    order = np.random.default_rng(0).permutation(30)
    permuted = solve(name, np.ascontiguousarray(target[:, order]), 10, 4)
    assert error(target[:, order], permuted) == pytest.approx(error(target, solve(name, target, 10, 4)), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_column_weights_solve_the_scaled_target(name):
    target = whitened_like(14, 30, seed=3)
    weights = np.random.default_rng(1).uniform(0.1, 4, 30)
    weighted = solve(name, target, 10, 4, column_weights=weights)
    scaled = solve(name, target * np.sqrt(weights), 10, 4)
    np.testing.assert_allclose(product(weighted) * np.sqrt(weights), product(scaled), atol=1e-9)
    assert not np.allclose(product(weighted), product(solve(name, target, 10, 4)), atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_equal_weights_change_nothing(name):
    target = whitened_like(14, 30, seed=4)
    weighted = solve(name, target, 10, 4, column_weights=np.full(30, 4.0))
    np.testing.assert_allclose(product(weighted), product(solve(name, target, 10, 4)), atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_all_coefficients_reach_the_best_approximation_of_that_rank(name):
    target = whitened_like(16, 40, seed=5)
    values = np.linalg.svd(target, compute_uv=False)
    best = np.sqrt(np.sum(values[9:] ** 2) / np.sum(values**2))
    # sklearn and single-step stay in the span of the singular vectors, iterative ones may leave it by rounding only
    assert error(target, solve(name, target, 9, 9)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_atoms_as_the_rank_reproduce_the_target(name):
    rng = np.random.default_rng(6)
    target = rng.standard_normal((16, 5)) @ rng.standard_normal((5, 30))
    assert error(target, solve(name, target, 5, 5)) < 1e-7
    assert error(target, solve(name, target, 8, 8)) < 1e-6


@pytest.mark.parametrize("name", OVERCOMPLETE)
def test_atoms_for_all_columns_reproduce_the_target(name):
    target = whitened_like(6, 9, seed=7)
    assert error(target, solve(name, target, 15, 6)) < 1e-6


@pytest.mark.parametrize("name", [n for n in OVERCOMPLETE if n != "sklearn"])
def test_more_atoms_than_dimensions_pay(name):
    target = whitened_like(24, 150, seed=8)
    assert error(target, solve(name, target, 48, 12)) < error(target, solve(name, target, 24, 12))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_targets_that_are_not_finite_are_refused(name, bad):
    target = whitened_like(6, 9)
    target[2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        solve(name, target, 4, 2)


@pytest.mark.parametrize("name", NAMES)
def test_torch_targets_come_back_as_torch(name):
    target = torch.from_numpy(whitened_like(12, 30, seed=9))
    before = target.clone()
    solution = solve(name, target, 8, 3)
    assert solution.dictionary.dtype == solution.coefficients.dtype == torch.float64
    assert torch.equal(target, before)
    assert error(target, solution) == pytest.approx(relative_error(target, solution), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_solvers_keep_nothing_and_state_why_they_stopped(name):
    method = solver(name)
    with pytest.raises(AttributeError):
        method.n_iter = 3
    assert solve(name, whitened_like(8, 12), 4, 2).status.value
    assert not inspect.isabstract(type(method))


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_solvers_beat_truncation_at_equal_storage(name):
    target = whitened_like(48, 160, seed=10)
    k, s = 32, 16
    rank = int(k * (48 + 160 / 2 + 160 / 16) / (48 + 160))
    assert error(target, solve(name, target, k, s)) < error(target, solve("svd", target, rank, rank))


def test_the_solvers_rank_as_documented():
    target = whitened_like(64, 256, seed=11)
    errors = {name: error(target, solve(name, target, 48, 24)) for name in NAMES if name != "svd"}
    assert errors["htp"] < errors["orthogonal"] < errors["single-step"]
    assert errors["htp"] < errors["mod"]
    assert errors["htp"] < errors["ksvd-numpy"] * 1.05
    assert errors["auto"] == errors["htp"]


def test_auto_says_what_it_chose():
    solution = solve("auto", whitened_like(8, 12), 4, 2)
    name, reason = SOLVERS.get("auto").choose("cpu")
    assert solution.statistics["solver"] == name
    assert solution.statistics["reason"] == reason
    assert name in NAMES


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("htp", {"n_iter": -1}, "n_iter=-1"),
        ("htp", {"start": "svd"}, "start"),
        ("ksvd-numpy", {"power_iterations": 0}, "power_iterations=0"),
        ("ksvd-numpy", {"init": "rows"}, "init"),
        ("ksvd-torch", {"tolerance": 1.5}, "tolerance=1.5"),
        ("mod", {"coder": "omq"}, "did you mean 'omp'"),
        ("mod", {"n_iter": 0}, "n_iter=0"),
        ("orthogonal", {"n_iter": -2}, "n_iter=-2"),
        ("spams", {"method": "lars"}, "method"),
        ("sklearn", {"n_iter": 0}, "n_iter=0"),
    ],
)
def test_wrong_options_are_named(name, options, match):
    with pytest.raises(UsageError, match=match):
        SOLVERS.create(name, options)


def test_options_given_as_text_become_typed():
    assert SOLVERS.create("ksvd-numpy", {"n_iter": "7", "coder": "spams", "tolerance": "0.01"}).n_iter == 7
