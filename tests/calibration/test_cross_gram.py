import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.calibration.cross_gram import CrossGram
from cospadi.errors import NumericalError


def draw(rng, *shape):
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.integers(0, 2**31))
def test_sums_over_batches_equal_those_of_all_rows(width, sizes, seed):
    rng = np.random.default_rng(seed)
    statistic = CrossGram("x", width)
    parts = [(draw(rng, n, width), draw(rng, n, width)) for n in sizes]
    before = [[t.clone() for t in part] for part in parts]
    for new, old in parts:
        statistic.add(new, old)
    assert all(
        torch.equal(a, b) for part, kept in zip(parts, before, strict=True) for a, b in zip(part, kept, strict=True)
    )
    new, old = (torch.cat(rows).double() for rows in zip(*parts, strict=True))
    assert statistic.n_tokens == len(new)
    torch.testing.assert_close(statistic.gram.matrix, new.T @ new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistic.shift, new.T @ (old - new), rtol=1e-5, atol=1e-4)


def test_equal_inputs_shift_by_exactly_nothing():
    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    statistic = CrossGram("x", 5)
    statistic.add(x, x.clone())
    assert not statistic.shift.any()
    assert statistic.n_tokens == 60


def test_a_small_shift_keeps_its_digits():
    generator = torch.Generator().manual_seed(0)
    new = torch.randn(400, 4, generator=generator) + 100
    old = new + 1e-3 * torch.randn(400, 4, generator=generator)
    statistic = CrossGram("x", 4)
    statistic.add(new, old)
    expected = new.double().T @ (old.double() - new.double())
    # The cross-Gram itself is about 4e6: its float32 rounding alone would be of the size of the shift.
    torch.testing.assert_close(statistic.shift, expected, rtol=1e-3, atol=1e-3)


def test_what_is_given_up_stays_so_and_is_told():
    x = torch.ones(3, 2)
    both = CrossGram("layer.4", 2)
    both.add(x, 2 * x)
    both.give_up("no counterpart")
    both.give_up("no counterpart")
    both.add(x, 2 * x)
    assert (both.shift, both.n_tokens, both.note) == (None, 6, "no counterpart")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("side", ["compressed", "dense"])
def test_bad_activations_stop_with_the_layers_name(bad, side):
    pair = {"compressed": torch.full((4, 3), 2.0), "dense": torch.full((4, 3), 2.0)}
    pair[side][1, 2] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.7.*NaN"):
        CrossGram("model.layers.7", 3).add(pair["compressed"], pair["dense"])
