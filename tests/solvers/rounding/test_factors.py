"""Dictionary and coefficients rounded together."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.formats.quantization import dequantize, grid_of, quantize
from cospadi.formats.values import round_values
from cospadi.solvers.rounding.factors import round_factors
from tests.solvers.rounding.problems import factorization

PAIRS = [
    ("int8", "int8"),
    ("int6g64", "int6"),
    ("int4g64", "int8"),
    ("int4g32", "int4"),
    ("bfloat16", "int8"),
    ("int8", "bfloat14"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
]


def nearest(matrix, dtype):
    grid = grid_of(dtype)
    rows = matrix.T.contiguous()
    return (round_values(rows, dtype) if grid is None else dequantize(*quantize(rows, grid), grid)).T.double()


def relative(L, Y, D, S, f=None):
    f = torch.ones(Y.shape[1]) if f is None else f
    squared = (Y - L.T @ D.double() @ S.double()).square().sum(dim=0)
    return float((squared * f).sum() / (Y.square().sum(dim=0) * f).sum()) ** 0.5


@settings(max_examples=25, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    d=st.integers(2, 20),
    n=st.integers(1, 40),
    n_atoms=st.integers(1, 30),
    share=st.floats(0, 1),
    dead=st.booleans(),
    seed=st.integers(0, 99),
)
@example(pair=("int4g32", "int4"), d=6, n=3, n_atoms=9, share=0.0, dead=False, seed=0)
@example(pair=("int8", "int8"), d=6, n=30, n_atoms=1, share=1.0, dead=True, seed=0)
def test_never_worse_than_rounding_both_to_nearest(pair, d, n, n_atoms, share, dead, seed):
    L, Y, D, S = factorization(d, n, n_atoms, round(share * n_atoms), seed)
    if not bool(Y.any()):
        Y = torch.ones_like(Y)
    if dead:
        D[:, 0] = 0
        S[-1] = 0
    f = torch.from_numpy(np.random.default_rng(seed).exponential(1.0, n))
    given_arrays = [x.clone() for x in (L, Y, D, S)]
    rounded = round_factors(L, Y, D, S, *pair, column_weights=f)
    assert all(torch.equal(a, b) for a, b in zip(given_arrays, (L, Y, D, S), strict=True))
    found = relative(L, Y, rounded.to_dictionary(), rounded.to_coefficients(), f)
    plain = relative(L, Y, nearest(D, pair[0]), nearest(S, pair[1]), f)
    assert found <= plain * (1 + 1e-9)
    assert found <= rounded.statistics["refit_error"] * (1 + 1e-9)
    assert rounded.statistics["relative_error"] == pytest.approx(found, rel=1e-6, abs=1e-12)
    assert rounded.statistics["nearest_error"] == pytest.approx(plain, rel=1e-6, abs=1e-12)
    assert not bool(rounded.to_coefficients()[S == 0].any())
    assert rounded.dictionary.shape == (n_atoms, d)
    assert rounded.coefficients.shape == (n, n_atoms)


@pytest.mark.parametrize("pair", [p for p in PAIRS if p[0].startswith("int") and p[1].startswith("int")])
def test_the_refit_takes_back_most_of_what_rounding_costs(pair):
    L, Y, D, S = factorization(64, 256, 48, 20, 1)
    rounded = round_factors(L, Y, D, S, *pair)
    added = {
        key: float(rounded.statistics[key]) ** 2 - float(rounded.statistics["unrounded_error"]) ** 2
        for key in ("relative_error", "nearest_error", "refit_error")
    }
    assert added["nearest_error"] > 0
    assert added["relative_error"] < 0.2 * added["nearest_error"]
    assert added["relative_error"] < 0.5 * added["refit_error"]
    assert str(rounded.statistics["rounding"]).startswith("round")


def test_a_return_to_the_dictionary_helps_few_bits():
    L, Y, D, S = factorization(64, 256, 48, 20, 2)
    once = round_factors(L, Y, D, S, "bfloat16", "int4", alternations=0)
    more = round_factors(L, Y, D, S, "bfloat16", "int4", alternations=2)
    assert float(more.statistics["relative_error"]) < 0.95 * float(once.statistics["relative_error"])


def test_column_weights_move_the_error_to_columns_that_do_not_matter():
    L, Y, D, S = factorization(40, 120, 30, 12, 3)
    f = torch.ones(120, dtype=torch.float64)
    f[60:] = 1e-4
    plain = round_factors(L, Y, D, S, "int4g32", "int4", alternations=2)
    weighted = round_factors(L, Y, D, S, "int4g32", "int4", alternations=2, column_weights=f)
    assert relative(L, Y, weighted.to_dictionary(), weighted.to_coefficients(), f) < 0.98 * relative(
        L, Y, plain.to_dictionary(), plain.to_coefficients(), f
    )


def test_the_sizes_of_the_atoms_that_are_given_do_not_matter():
    L, Y, D, S = factorization(30, 60, 20, 8, 4)
    sizes = torch.from_numpy(np.exp(np.random.default_rng(0).standard_normal(20) * 2))
    one = round_factors(L, Y, D, S, "int8", "int6")
    other = round_factors(L, Y, D * sizes, S / sizes[:, None], "int8", "int6")
    assert other.statistics["relative_error"] == pytest.approx(one.statistics["relative_error"], rel=0.02)


@pytest.mark.parametrize("pair", [("float16", "float16"), ("float16", "int8"), ("int8", "float16")])
@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_inputs_of_any_size_fit_float16(pair, size):
    # Grams of many tokens or tiny features: atoms of unit norm in the whitened space are tiny or huge outside of it.
    L, Y, D, S = factorization(16, 20, 10, 4, 5)
    D = D / D.abs().amax(dim=0)
    S = torch.linalg.lstsq(L.T @ D, Y).solution * (S != 0)
    Y = L.T @ D @ S
    found = round_factors(L * size, Y * size, D, S, *pair).statistics
    assert found["rounding"] != "nearest"
    assert found["relative_error"] < (0.002 if "int8" not in pair else 0.2)
    assert found["relative_error"] == pytest.approx(
        round_factors(L, Y, D, S, *pair).statistics["relative_error"], rel=0.2
    )


def test_misuse_is_refused():
    L, Y, D, S = factorization(6, 5, 4, 2)
    with pytest.raises(UsageError, match="one scale per column"):
        round_factors(L, Y, D, S, "int8", "int4g32")
    with pytest.raises(UsageError, match="alternations=-1"):
        round_factors(L, Y, D, S, "int8", "int8", alternations=-1)
    with pytest.raises(NumericalError, match="target"):
        round_factors(L, Y * np.nan, D, S, "int8", "int8")
    with pytest.raises(NumericalError, match="weights"):
        round_factors(L, Y, D, S, "int8", "int8", column_weights=torch.full((5,), -1.0))
