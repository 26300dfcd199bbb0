"""Coefficients rounded on their support."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.formats.quantization import GRIDS, dequantize, quantize
from cospadi.solvers.rounding.coefficients import round_coefficients
from tests.solvers.rounding.problems import COLUMN_GRIDS


def problem(d, n, n_atoms, n_nonzero, seed):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, n_atoms)) + rng.standard_normal((d, 1))  # atoms that resemble each other
    S = np.zeros((n_atoms, n))
    for j in range(n):
        S[rng.permutation(n_atoms)[:n_nonzero], j] = rng.standard_t(3, n_nonzero)
    Y = A @ S + 0.1 * rng.standard_normal((d, n))
    return torch.from_numpy(A), torch.from_numpy(Y), torch.from_numpy(S)


def column_errors(A, Y, values, scales, grid):
    return (Y.double() - A.double() @ dequantize(values, scales, grid).T.double()).square().sum(dim=0)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(COLUMN_GRIDS),
    d=st.integers(1, 9),
    n=st.integers(1, 40),
    n_atoms=st.integers(1, 80),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@example(name="int4", d=5, n=3, n_atoms=70, share=0.0, seed=0)
@example(name="int8", d=1, n=33, n_atoms=1, share=1.0, seed=0)
def test_no_column_is_worse_than_rounded_to_nearest_and_the_support_is_kept(name, d, n, n_atoms, share, seed):
    grid = GRIDS[name]
    A, Y, S = problem(d, n, n_atoms, round(share * n_atoms), seed)
    A[:, -1] = 0  # a dead atom
    before = S.clone()
    rounded = round_coefficients(A, Y, S, grid)
    assert torch.equal(S, before)
    assert not bool(rounded.values[S.T == 0].any())
    quantize(S.T.contiguous(), grid, rounded.scales)  # refuses scales that no file can hold
    found = column_errors(A, Y, rounded.values, rounded.scales, grid)
    plain = column_errors(A, Y, *quantize(S.T.contiguous(), grid), grid)
    assert bool((found <= plain + 1e-11 * Y.square().sum(dim=0)).all())


@pytest.mark.parametrize("name", COLUMN_GRIDS)
def test_atoms_that_resemble_each_other_make_up_for_each_other(name):
    A, Y, S = problem(24, 60, 40, 20, 5)
    rounded = round_coefficients(A, Y, S, GRIDS[name])
    found = float(column_errors(A, Y, rounded.values, rounded.scales, GRIDS[name]).sum())
    plain = float(column_errors(A, Y, *quantize(S.T.contiguous(), GRIDS[name]), GRIDS[name]).sum())
    least = float((Y - A @ S).square().sum())
    assert found < least + 0.5 * (plain - least)


@pytest.mark.parametrize("seed", range(3))
def test_no_single_coefficient_could_be_better_and_none_is_better_than_the_best_of_all(seed):
    grid = GRIDS["int4"]
    A, Y, S = problem(4, 2, 5, 3, seed)
    rounded = round_coefficients(A, Y, S, grid)
    found = column_errors(A, Y, rounded.values, rounded.scales, grid)
    for column in range(2):
        support = torch.nonzero(S[:, column])[:, 0]
        levels = torch.tensor(list(itertools.product(range(-8, 8), repeat=3)), dtype=torch.float64)
        products = (levels * float(rounded.scales[column])) @ A[:, support].T
        errors = (Y[:, column] - products).square().sum(dim=1)
        assert float(found[column]) >= float(errors.min()) * (1 - 1e-9)
        neighbours = (levels != rounded.values[column, support]).sum(dim=1) == 1
        assert float(found[column]) <= float(errors[neighbours].min()) * (1 + 1e-5)


def test_sizes_do_not_matter():
    A, Y, S = problem(8, 10, 12, 6, 0)
    plain = round_coefficients(A, Y, S, GRIDS["int6"])
    scaled = round_coefficients(A * 2.0**30, Y * 2.0**-20, S * 2.0**-50, GRIDS["int6"])
    assert torch.equal(plain.values, scaled.values)
    assert torch.equal(plain.scales * 2.0**-50, scaled.scales)


def test_groups_and_bad_numbers_are_refused():
    A, Y, S = problem(4, 3, 5, 2, 0)
    with pytest.raises(UsageError, match="one scale per column"):
        round_coefficients(A, Y, S, GRIDS["int4g32"])
    A[0, 0] = np.nan
    with pytest.raises(NumericalError, match="dictionary"):
        round_coefficients(A, Y, S, GRIDS["int8"])
