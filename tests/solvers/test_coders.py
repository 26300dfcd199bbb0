"""Sparse coders: what matching pursuit must obey, and its compiled loop against slow references."""

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp_gram

from cospadi.errors import UsageError
from cospadi.solvers.coders import CODERS, BatchOMP, HardThreshold, SklearnOMP, SpamsOMP, as_coder
from tests.helpers_solvers import as_library, unit

HAS_SPAMS = importlib.util.find_spec("spams") is not None
PURSUITS = [BatchOMP(), BatchOMP(compiled=False), SklearnOMP(), *([SpamsOMP(threads=2)] if HAS_SPAMS else [])]
ALL = [*PURSUITS, HardThreshold()]
LABELS = ["compiled", "arrays", "sklearn", *(["spams"] if HAS_SPAMS else []), "threshold"]


def problem(d=20, n=30, k=25, seed=0):
    rng = np.random.default_rng(seed)
    return unit(rng.standard_normal((d, k))), rng.standard_normal((d, n))


def naive(A, Y, n_nonzero):
    """Orthogonal matching pursuit by full least squares in each step."""
    S = np.zeros((A.shape[1], Y.shape[1]))
    for j in range(Y.shape[1]):
        support, residual = [], Y[:, j]
        for _ in range(n_nonzero):
            support.append(int(np.argmax(np.abs(A.T @ residual))))
            values = np.linalg.lstsq(A[:, support], Y[:, j], rcond=None)[0]
            residual = Y[:, j] - A[:, support] @ values
        S[support, j] = values
    return S


@pytest.mark.parametrize("library", ["numpy", "torch", "strict"])
@pytest.mark.parametrize("compiled", [True, False])
@settings(max_examples=15, deadline=None)
@given(
    d=st.integers(2, 90), n=st.integers(1, 20), k=st.integers(1, 90), part=st.floats(0.05, 0.9), seed=st.integers(0, 99)
)
def test_pursuit_equals_full_least_squares_in_each_step(library, compiled, d, n, k, part, seed):
    A, Y = problem(d, n, k, seed)
    s = max(1, int(part * min(d, k)))
    coding = BatchOMP(compiled=compiled).encode(as_library(A, library), as_library(Y, library), s)
    assert type(coding.coefficients) is type(as_library(A, library))
    S, expected = np.asarray(coding.coefficients), naive(A, Y, s)
    np.testing.assert_array_equal(S != 0, expected != 0)
    np.testing.assert_allclose(S, expected, atol=1e-8)
    assert coding.dependent_columns == 0


def test_pursuit_equals_scikit_learn():
    A, Y = problem(64, 40, 90, seed=1)
    expected = orthogonal_mp_gram(A.T @ A, A.T @ Y, n_nonzero_coefs=32)
    S = BatchOMP().encode(A, Y, 32).coefficients
    np.testing.assert_array_equal(S != 0, expected != 0)
    np.testing.assert_allclose(S, expected, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compiled_and_lockstep_agree(dtype):
    A, Y = (a.astype(dtype) for a in problem(40, 60, 70, seed=2))
    compiled, lockstep = BatchOMP().encode(A, Y, 12), BatchOMP(compiled=False).encode(A, Y, 12)
    np.testing.assert_allclose(compiled.coefficients, lockstep.coefficients, atol=200 * np.finfo(dtype).eps)
    assert compiled.coefficients.dtype == dtype


def test_the_memory_bound_of_lockstep_batches_changes_nothing():
    A, Y = problem(60, 500, 120, seed=3)
    small, large = (BatchOMP(memory_mib=m, compiled=False).encode(A, Y, 20).coefficients for m in (1, 512))
    np.testing.assert_allclose(small, large, atol=1e-10)


@pytest.mark.parametrize("coder", PURSUITS, ids=LABELS[:-1])
def test_the_residual_is_orthogonal_to_the_chosen_atoms(coder):
    A, Y = problem(seed=4)
    S = coder.encode(A, Y, 6).coefficients
    assert np.all(np.count_nonzero(S, axis=0) == 6)
    assert np.abs((A.T @ (Y - A @ S))[S != 0]).max() < 1e-10


@pytest.mark.parametrize("coder", PURSUITS, ids=LABELS[:-1])
def test_more_atoms_never_raise_the_error_of_a_column(coder):
    A, Y = problem(seed=5)
    errors = [np.linalg.norm(Y - A @ coder.encode(A, Y, s).coefficients, axis=0) for s in range(0, 12)]
    np.testing.assert_array_equal(errors[0], np.linalg.norm(Y, axis=0))
    assert np.all(np.diff(errors, axis=0) < 1e-12)


@pytest.mark.parametrize("coder", ALL, ids=LABELS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_zero_equal_and_dependent_atoms_and_zero_columns_stay_finite(coder, dtype):
    A, Y = problem(6, 12, 9, seed=6)
    A[:, 1], A[:, 2], A[:, 3] = A[:, 0], 0, -A[:, 0]
    A[:, 4] = (A[:, 0] + A[:, 5]) / np.linalg.norm(A[:, 0] + A[:, 5])
    Y[:, 3] = 0
    A, Y = A.astype(dtype), Y.astype(dtype)
    kept = A.copy(), Y.copy()
    S = coder.encode(A, Y, 9).coefficients
    np.testing.assert_array_equal(A, kept[0])
    np.testing.assert_array_equal(Y, kept[1])
    assert np.all(np.isfinite(S))
    assert not S[2].any()
    assert not S[:, 3].any()
    if not isinstance(coder, HardThreshold):
        assert np.linalg.norm(Y - A @ S) <= np.linalg.norm(Y)


@pytest.mark.parametrize("coder", [BatchOMP(), BatchOMP(compiled=False), SklearnOMP()], ids=LABELS[:3])
def test_columns_that_exhaust_the_span_of_the_atoms_end_there(coder):
    rng = np.random.default_rng(7)
    # Atoms of a plane and a target outside it: two atoms exhaust the plane, the third is dependent.
    plane = np.linalg.qr(rng.standard_normal((8, 2)))[0]
    A = unit(plane @ rng.standard_normal((2, 5)))
    Y = rng.standard_normal((8, 10))
    Y[:, 0] = 0
    coding = coder.encode(A, Y, 4)
    assert np.count_nonzero(coding.coefficients, axis=0).max() <= 3
    np.testing.assert_allclose(A @ coding.coefficients, plane @ (plane.T @ Y), atol=1e-7)


def test_a_nearly_dependent_atom_ends_the_column_visibly():
    A = unit(np.array([[1.0, 1.0, 0.0], [0.0, 1e-7, 0.0], [0.0, 0.0, 1.0]]))
    Y = np.array([[1.0], [1.0], [2.0]])
    for compiled in (True, False):
        coding = BatchOMP(compiled=compiled).encode(A, Y, 3)
        assert coding.dependent_columns == 1
        np.testing.assert_allclose(np.abs(A @ coding.coefficients)[:, 0], [1, 0, 2], atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
def test_ties_go_to_the_lowest_atom(compiled):
    A = np.eye(70)[:, ::-1].copy()
    Y = np.ones((70, 3))
    Y[:, 1] = -1
    for s in (1, 5, 66):
        S = BatchOMP(compiled=compiled).encode(A, Y, s).coefficients
        expected = np.zeros((70, 3))
        expected[:s] = [1, -1, 1]
        np.testing.assert_array_equal(S, expected)


def test_the_compiled_loop_does_not_depend_on_the_thread_count():
    import numba

    A, Y = (a.astype(np.float32) for a in problem(60, 200, 100, seed=8))
    from cospadi.solvers.kernels import pursue

    gram, starts, used = A.T @ A, np.ascontiguousarray(Y.T @ A), numba.get_num_threads()
    results = []
    try:
        for threads in (1, used):
            numba.set_num_threads(threads)
            results.append(pursue(gram, starts, 25, 1e-5, 1e-6)[0].tobytes())
    finally:
        numba.set_num_threads(used)
    assert results[0] == results[1]


def test_a_column_is_coded_on_its_own():
    A, Y = problem(20, 30, 25, seed=9)
    gram_free = BatchOMP().encode(A, np.ascontiguousarray(Y[:, 11:12]), 7).coefficients[:, 0]
    np.testing.assert_allclose(BatchOMP().encode(A, Y, 7).coefficients[:, 11], gram_free, atol=1e-12)


@pytest.mark.skipif(not HAS_SPAMS, reason="SPAMS is not installed")
def test_spams_reaches_a_comparable_residual():
    A, Y = problem(48, 100, 80, seed=10)
    ours, theirs = (np.linalg.norm(Y - A @ c.encode(A, Y, 12).coefficients) for c in (BatchOMP(), SpamsOMP()))
    # It selects by the fall of the error, which is a little better and never much worse.
    assert theirs == pytest.approx(ours, rel=0.05)


def test_the_threshold_is_exact_for_orthonormal_atoms():
    A = np.linalg.qr(np.random.default_rng(11).standard_normal((12, 12)))[0]
    Y = problem(12, 20)[1]
    np.testing.assert_allclose(
        HardThreshold().encode(A, Y, 4).coefficients, BatchOMP().encode(A, Y, 4).coefficients, atol=1e-12
    )


@pytest.mark.parametrize("coder", ALL, ids=LABELS)
def test_no_non_zeros_asked_gives_none(coder):
    A, Y = problem()
    assert not coder.encode(A, Y, 0).coefficients.any()


def test_coders_have_names_and_unknown_ones_are_refused():
    assert all(type(as_coder(name)) is CODERS[name] for name in CODERS)
    assert as_coder(BatchOMP(memory_mib=3)).memory_mib == 3
    with pytest.raises(UsageError, match="did you mean 'omp'"):
        as_coder("opm")
    with pytest.raises(UsageError, match="memory_mib=0"):
        BatchOMP(memory_mib=0)
