"""Scales that are searched: never worse than those of the largest magnitudes, and close to the best there are."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError
from cospadi.formats.quantization import GRIDS, check_scales, dequantize, quantize, representable_scales, scale_shape
from cospadi.solvers.rounding.scales import search_scales
from tests.solvers.rounding.problems import NAMES


def group_errors(rows, values, scales, grid, weights):
    errors = (rows.double() - dequantize(values, scales, grid).double()).square() * weights
    parts = errors.split(grid.group or rows.shape[1], dim=1)
    return torch.stack([part.sum(dim=1) for part in parts], dim=1)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    n_rows=st.integers(1, 4),
    n=st.integers(1, 150),
    exponent=st.integers(-40, 36),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
@example(name="int2g32", n_rows=2, n=33, exponent=-40, zeros=True, seed=0)
@example(name="int8", n_rows=1, n=1, exponent=36, zeros=False, seed=0)
def test_no_group_is_worse_than_with_its_largest_magnitude(name, n_rows, n, exponent, zeros, seed):
    grid = GRIDS[name]
    rng = np.random.default_rng(seed)
    rows = torch.from_numpy(rng.standard_t(3, (n_rows, n)) * 10.0**exponent / 100)
    weights = torch.from_numpy(rng.exponential(1.0, n))
    if zeros:
        rows[0] = 0
        weights[: n // 2] = 0
    before = rows.clone()
    scales = search_scales(rows, grid, weights)
    assert torch.equal(rows, before)
    assert scales.shape == scale_shape(n_rows, n, grid)
    check_scales("scales", scales, grid)
    found = group_errors(rows, *quantize(rows, grid, scales), grid, weights)
    plain = group_errors(rows, *quantize(rows, grid), grid, weights)
    assert bool((found <= plain).all())


@pytest.mark.parametrize(("name", "slack"), [("int6g64", 1.1), ("int4g64", 1.05), ("int3g32", 1.05), ("int2g32", 1.05)])
def test_the_error_is_close_to_that_of_the_best_of_thousands_of_scales(name, slack):
    grid = GRIDS[name]
    rng = np.random.default_rng(3)
    rows = torch.from_numpy(rng.standard_normal((6, 32)))
    weights = torch.from_numpy(rng.exponential(1.0, 32))
    found = group_errors(rows, *quantize(rows, grid, search_scales(rows, grid, weights)), grid, weights)[:, 0]
    steps = rows.abs().amax(dim=1) / -grid.lowest
    best = torch.full((6,), np.inf, dtype=torch.float64)
    for factor in np.linspace(-2.2, 2.2, 6000):  # of either sign
        scale = representable_scales(factor * steps, grid)[:, None].double()
        rounded = (rows / scale).round().clamp(grid.lowest, grid.highest) * scale
        best = torch.minimum(best, ((rows - rounded).square() * weights).sum(dim=1))
    assert float(found.sum()) <= slack * float(best.sum())
    plain = group_errors(rows, *quantize(rows, grid), grid, weights)[:, 0]
    assert float(found.sum()) < 0.95 * float(plain.sum())


def test_weights_decide_which_numbers_are_kept():
    rows = torch.tensor([[10.0, 1.0, -0.6, 0.3]])
    grid = GRIDS["int3g32"]
    light = quantize(rows, grid, search_scales(rows, grid, torch.tensor([1e-6, 1, 1, 1.0])))
    assert float((rows - dequantize(*light, grid))[0, 1:].abs().max()) < 0.15
    heavy = quantize(rows, grid, search_scales(rows, grid, torch.tensor([1e6, 1, 1, 1.0])))
    assert float((rows - dequantize(*heavy, grid))[0, 0].abs()) < 0.05


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(bad):
    with pytest.raises(NumericalError, match="weights"):
        search_scales(torch.ones(1, 2), GRIDS["int8"], torch.tensor([1.0, bad]))
