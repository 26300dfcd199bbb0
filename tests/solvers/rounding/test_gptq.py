"""Rows rounded in the metric of a Gram."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.formats.quantization import GRIDS, dequantize, quantize, scale_shape
from cospadi.solvers.rounding.dense import quantize_dense
from cospadi.solvers.rounding.gptq import round_rows
from tests.solvers.rounding.problems import NAMES, correlated_gram, errors_of_rows, weight_rows


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    n_rows=st.integers(1, 5),
    n=st.integers(1, 140),
    tokens=st.integers(0, 200),
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
@example(name="int4g32", n_rows=3, n=65, tokens=0, dead=False, seed=0)  # no token seen
@example(name="int8", n_rows=3, n=140, tokens=3, dead=True, seed=0)  # far from full rank
@example(name="int2g32", n_rows=1, n=1, tokens=9, dead=False, seed=1)
@example(name="int3g64", n_rows=2, n=3, tokens=9, dead=True, seed=1)
def test_no_row_is_worse_than_rounded_to_nearest(name, n_rows, n, tokens, dead, seed):
    grid = GRIDS[name]
    gram = correlated_gram(n, seed, tokens)
    if dead:
        gram[: n // 2 + 1] = 0
        gram[:, : n // 2 + 1] = 0
    rows = weight_rows(n_rows, n, seed)
    before = rows.clone(), gram.clone()
    rounded = round_rows(rows, gram, grid)
    assert torch.equal(rows, before[0])
    assert torch.equal(gram, before[1])
    assert rounded.values.dtype == torch.int8
    assert rounded.scales.shape == scale_shape(n_rows, n, grid)
    assert grid.lowest <= int(rounded.values.min()) <= int(rounded.values.max()) <= grid.highest
    quantize(rows, grid, rounded.scales)  # refuses scales that no file can hold
    metric = gram if bool(gram.any()) else torch.eye(n)
    found = errors_of_rows(rows, (rounded.values, rounded.scales), grid, metric)
    plain = errors_of_rows(rows, quantize(rows, grid), grid, metric)
    size = torch.einsum("ri,ij,rj->r", rows, metric.double(), rows)
    assert bool((found <= plain + 1e-12 * size).all())
    if dead:
        zero = n if n // 2 + 1 >= n else n // 2 + 1
        assert rounded.statistics["zero_features"] == (0 if zero == n or not bool(gram.any()) else zero)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_correlated_features_it_is_much_better(name, seed):
    rows, gram = weight_rows(24, 160, seed), correlated_gram(160, seed)
    rounded = round_rows(rows, gram, GRIDS[name])
    found = float(errors_of_rows(rows, (rounded.values, rounded.scales), GRIDS[name], gram).sum())
    plain = float(errors_of_rows(rows, quantize(rows, GRIDS[name]), GRIDS[name], gram).sum())
    norm = float(torch.einsum("ri,ij,rj->", rows, gram, rows))
    assert found < 0.36 * plain  # of the squared error
    assert rounded.statistics["relative_error"] == pytest.approx((found / norm) ** 0.5, rel=1e-6)
    assert rounded.statistics["nearest_error"] == pytest.approx((plain / norm) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_without_correlation_it_is_rounding_to_nearest_under_its_scales(name):
    rows = weight_rows(8, 100)
    energies = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    for gram in (torch.eye(100), torch.diag(energies)):
        rounded = round_rows(rows, gram, GRIDS[name])
        assert torch.equal(rounded.values, quantize(rows, GRIDS[name], rounded.scales)[0])


def gptq_of_the_paper(rows, gram, scales, grid, damping):
    """Frantar et al. 2022 literally, in float64: the upper Cholesky factor of the inverse, one column at a time."""
    W = rows.double().clone()
    n = W.shape[1]
    H = gram.double() + damping * torch.diag(gram.double().diagonal())
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    spread = dequantize(torch.ones(W.shape, dtype=torch.int8), scales, grid).double()
    wholes = torch.empty_like(W)
    for i in range(n):
        wholes[:, i] = (W[:, i] / spread[:, i]).round().clamp(grid.lowest, grid.highest)
        error = (W[:, i] - wholes[:, i] * spread[:, i]) / U[i, i]
        W[:, i:] -= error[:, None] * U[i, i:]
    return wholes


@pytest.mark.parametrize("name", ["int8", "int6g64", "int4g128", "int2g32"])
def test_the_sequential_part_agrees_with_the_paper_without_any_inverse(name):
    rows, gram = weight_rows(16, 300), correlated_gram(300)
    rounded = round_rows(rows, gram, GRIDS[name], sweeps=0)
    assert rounded.statistics["nearest_rows"] == 0
    expected = gptq_of_the_paper(rows, gram, rounded.scales, GRIDS[name], 0.01)
    # Numbers on a tie may fall either way in float32, and others of the row follow.
    same_rows = (rounded.values == expected).all(dim=1)
    assert int(same_rows.sum()) >= 12


@pytest.mark.parametrize("seed", range(4))
def test_no_single_number_could_be_better_and_none_is_better_than_the_best_of_all(seed):
    grid = GRIDS["int2g32"]
    rows, gram = weight_rows(2, 3, seed), correlated_gram(3, seed)
    rounded = round_rows(rows, gram, grid)
    found = errors_of_rows(rows, (rounded.values, rounded.scales), grid, gram)
    levels = list(itertools.product(range(-2, 2), repeat=3))
    for row in range(2):
        everything = torch.tensor(levels, dtype=torch.int8)
        scales = rounded.scales[row].expand(len(levels), 1)
        errors = errors_of_rows(rows[row].expand(len(levels), 3), (everything, scales), grid, gram)
        assert float(found[row]) >= float(errors.min()) * (1 - 1e-9)
        for one, error in zip(levels, errors.tolist(), strict=True):
            if sum(a != b for a, b in zip(one, rounded.values[row].tolist(), strict=True)) == 1:
                assert float(found[row]) <= error * (1 + 1e-5)


def test_the_descent_only_lowers_the_error():
    rows, gram = weight_rows(24, 160), correlated_gram(160)
    errors = [float(round_rows(rows, gram, GRIDS["int4g32"], sweeps=s).statistics["relative_error"]) for s in range(4)]
    assert errors[0] > errors[1] > errors[2] > errors[3]


@pytest.mark.parametrize("name", ["int8", "int4g32"])
def test_neither_the_size_of_the_weights_nor_that_of_the_gram_matters(name):
    rows, gram = weight_rows(6, 70), correlated_gram(70)
    plain = round_rows(rows, gram, GRIDS[name])
    for exponent in (-80, 60):
        scaled = round_rows(rows * 2.0**exponent, gram * 2.0**-40, GRIDS[name])
        assert torch.equal(scaled.values, plain.values)
        assert torch.equal(scaled.scales.double(), plain.scales.double() * 2.0**exponent)


def test_singular_grams_are_damped_visibly_and_impossible_ones_refused():
    rows, gram = weight_rows(4, 50), correlated_gram(50, tokens=10)
    assert float(round_rows(rows, gram, GRIDS["int8"], damping=0).statistics["damping"]) > 0
    assert round_rows(rows, correlated_gram(50), GRIDS["int8"], damping=0).statistics["damping"] == 0
    indefinite = torch.eye(4)
    indefinite[0, 1] = indefinite[1, 0] = 9.0
    with pytest.raises(NumericalError, match="semi-definite"):
        round_rows(weight_rows(2, 4), indefinite, GRIDS["int8"])
    gram[3, 3] = np.nan
    with pytest.raises(NumericalError, match="Gram"):
        round_rows(rows, gram, GRIDS["int8"])
    with pytest.raises(UsageError, match="sweeps=-1"):
        round_rows(rows, gram, GRIDS["int8"], sweeps=-1)


def test_dense_layers_by_name():
    rows, gram = weight_rows(12, 96).to(torch.bfloat16), correlated_gram(96)
    nearest = quantize_dense(rows, gram, "int4g32", "nearest")
    values, scales = quantize(rows, GRIDS["int4g32"])
    assert torch.equal(nearest.values, values)
    assert torch.equal(nearest.scales, scales)
    better = quantize_dense(rows, gram, "int4g32")
    assert better.statistics["nearest_error"] == pytest.approx(nearest.statistics["relative_error"])
    again = quantize_dense(rows, gram, "int4g32")
    assert torch.equal(better.values, again.values)
    assert torch.equal(better.scales, again.scales)
    with pytest.raises(UsageError, match="int9"):
        quantize_dense(rows, gram, "int9")
    with pytest.raises(UsageError, match="best"):
        quantize_dense(rows, gram, "int8", "best")
