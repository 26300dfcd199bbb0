"""The blocked atom updates of K-SVD against one atom after the other."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.solvers.atoms import update_blocks_in_sequence, update_blocks_jointly
from cospadi.solvers.coders import BatchOMP
from tests.helpers_solvers import as_library, unit, whitened_like

UPDATES = [update_blocks_in_sequence, update_blocks_jointly]


def coded(d=12, n=70, k=9, s=3, seed=0):
    rng = np.random.default_rng(seed)
    Y, A = whitened_like(d, n, seed), unit(rng.standard_normal((d, k)))
    return Y, A, BatchOMP().encode(A, Y, s).coefficients * rng.uniform(0.7, 1.3, (k, n))


def one_after_the_other(Y, A, S, sweeps=1):
    """Rubinstein, Zibulevsky, Elad 2008, algorithm 5: each atom from its coefficients, then these from the atom."""
    A, S = A.copy(), S.copy()
    for _ in range(sweeps):
        for i in range(A.shape[1]):
            used = np.flatnonzero(S[i])
            E = Y[:, used] - A @ S[:, used] + np.outer(A[:, i], S[i, used])
            if np.linalg.norm(E @ S[i, used]) > 0:
                A[:, i] = unit(E @ S[i, used])
                S[i, used] = E.T @ A[:, i]
    return A, S


@pytest.mark.parametrize("block", [2, 4, 9, 50])
@pytest.mark.parametrize("library", ["numpy", "torch", "strict"])
def test_blocks_in_sequence_equal_one_atom_after_the_other(block, library):
    Y, A, S = coded()
    S[4] = 0
    expected = one_after_the_other(Y, A, S)
    arrays = (as_library(array, library) for array in (A, S, Y - A @ S))
    got = [np.asarray(array) for array in update_blocks_in_sequence(*arrays, block, 1)]
    np.testing.assert_allclose(got[0], expected[0], atol=1e-11)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-11)
    np.testing.assert_allclose(got[2], Y - expected[0] @ expected[1], atol=1e-11)


def test_more_sweeps_of_one_block_are_more_sweeps_of_all_atoms():
    Y, A, S = coded(seed=1)
    expected = one_after_the_other(Y, A, S, sweeps=3)
    got = update_blocks_in_sequence(A, S, Y - A @ S, 9, 3)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-10)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-10)


def test_a_joint_block_of_one_atom_is_the_sequence():
    # the exact step length of a single atom is one
    Y, A, S = coded(seed=2)
    expected = one_after_the_other(Y, A, S)
    got = update_blocks_jointly(A, S, Y - A @ S, 1, 1)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-11)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-11)


@pytest.mark.parametrize("library", ["torch", "strict"])
def test_joint_blocks_agree_between_libraries(library):
    Y, A, S = coded(seed=3)
    expected = update_blocks_jointly(A, S, Y - A @ S, 4, 2)
    got = update_blocks_jointly(*(as_library(array, library) for array in (A, S, Y - A @ S)), 4, 2)
    for one, other in zip(got, expected, strict=True):
        assert type(one) is type(as_library(Y, library))
        np.testing.assert_allclose(np.asarray(one), other, atol=1e-11)


@pytest.mark.parametrize("update", UPDATES)
@settings(max_examples=40, deadline=None)
@given(
    d=st.integers(1, 24),
    n=st.integers(1, 50),
    k=st.integers(1, 30),
    part=st.floats(0, 1),
    block=st.integers(1, 32),
    sweeps=st.integers(1, 2),
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1e-15, 1.0, 1e12]),
    seed=st.integers(0, 99),
)
@example(d=12, n=2, k=13, part=1.0, block=2, sweeps=1, dtype=np.float32, scale=1e12, seed=0)
def test_a_blocked_update_never_raises_the_error_and_keeps_the_support(
    update, d, n, k, part, block, sweeps, dtype, scale, seed
):
    rng = np.random.default_rng(seed)
    Y, A = scale * whitened_like(d, n, seed), unit(rng.standard_normal((d, k)))
    A[:, -1] = A[:, 0]
    Y[:, 0] = 0
    S = BatchOMP().encode(A, Y, int(part * k)).coefficients * rng.uniform(0.5, 1.5, (k, n))
    S[k // 2] = 0
    Y, A, S = (array.astype(dtype) for array in (Y, A, S))
    residual = Y - A @ S
    kept = [array.copy() for array in (A, S, residual)]
    A1, S1, R1 = update(A, S, residual, block, sweeps)
    for array, before in zip((A, S, residual), kept, strict=True):
        np.testing.assert_array_equal(array, before)
    eps = np.finfo(dtype).eps
    size = max(float(np.linalg.norm(Y)), float(np.linalg.norm(S)))
    exact = Y.astype(np.float64) - A1.astype(np.float64) @ S1
    assert np.linalg.norm(exact) <= np.linalg.norm(residual.astype(np.float64)) + 100 * eps * size
    np.testing.assert_allclose(R1, exact, atol=200 * eps * size)
    assert not np.any(S1[S == 0])
    np.testing.assert_allclose(np.linalg.norm(A1, axis=0), 1, rtol=20 * eps)
    np.testing.assert_array_equal(A1[:, k // 2], A[:, k // 2])
    assert A1.dtype == S1.dtype == R1.dtype == dtype


@pytest.mark.parametrize("update", UPDATES)
def test_repeated_updates_descend_and_leave_less_and_less_to_gain(update):
    def gradients(A, S, R):
        # of the atoms, and of the coefficients on their support
        return np.linalg.norm(R @ S.T), np.linalg.norm((A.T @ R)[S != 0])

    Y, A, S = coded(seed=4)
    R = Y - A @ S
    errors, first = [np.linalg.norm(R)], gradients(A, S, R)
    for _ in range(500):
        A, S, R = update(A, S, R, 4, 1)
        errors.append(np.linalg.norm(R))
    assert np.all(np.diff(errors) <= 1e-12)
    for last, start in zip(gradients(A, S, R), first, strict=True):
        assert last < 0.03 * start
