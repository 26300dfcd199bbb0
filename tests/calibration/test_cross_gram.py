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
@given(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=4), st.booleans(), st.integers(0, 2**31))
def test_sums_over_batches_equal_those_of_all_rows(width, sizes, weighted, seed):
    rng = np.random.default_rng(seed)
    statistic = CrossGram("x", width, drift=True)
    parts = [(draw(rng, n, width), draw(rng, n, width), draw(rng, n).abs()) for n in sizes]
    before = [[t.clone() for t in part] for part in parts]
    for new, old, weights in parts:
        statistic.add(new, old, weights if weighted else None)
    assert all(
        torch.equal(a, b) for part, kept in zip(parts, before, strict=True) for a, b in zip(part, kept, strict=True)
    )
    new, old, weights = (torch.cat(rows).double() for rows in zip(*parts, strict=True))
    scaled = new * weights[:, None] if weighted else new
    assert statistic.n_tokens == len(new)
    torch.testing.assert_close(statistic.gram.matrix, scaled.T @ new, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(statistic.cross, scaled.T @ old, rtol=1e-5, atol=1e-4)
    reference = old * weights[:, None] if weighted else old
    torch.testing.assert_close(statistic.dense, reference.T @ old, rtol=1e-5, atol=1e-4)


def test_equal_inputs_shift_by_exactly_nothing():
    x = torch.randn(2, 30, 5, generator=torch.Generator().manual_seed(0))
    statistic = CrossGram("x", 5)
    statistic.add(x, x.clone())
    assert not statistic.shift.any()
    assert torch.equal(statistic.cross, statistic.gram.matrix)
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


def test_what_is_missing_is_told():
    x = torch.ones(3, 2)
    alone = CrossGram("layer.3", 2)
    alone.add(x)
    with pytest.raises(ValueError, match=r"layer\.3.*no dense model"):
        _ = alone.cross
    both = CrossGram("layer.4", 2, drift=True)
    both.add(x, 2 * x)
    both.give_up("no counterpart")
    both.give_up("no counterpart")
    both.remark("another")
    both.add(x, 2 * x)
    assert (both.shift, both.drift, both.n_tokens, both.note) == (None, None, 6, "no counterpart; another")
    with pytest.raises(ValueError, match="no counterpart"):
        _ = both.cross
    with pytest.raises(ValueError, match="no Gram of the drift"):
        _ = alone.dense


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("side", ["compressed", "dense"])
def test_bad_activations_stop_with_the_layers_name(bad, side):
    pair = {"compressed": torch.full((4, 3), 2.0), "dense": torch.full((4, 3), 2.0)}
    pair[side][1, 2] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.7.*NaN"):
        CrossGram("model.layers.7", 3).add(pair["compressed"], pair["dense"])
