import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.calibration.gram import Gram, fold, unfold
from cospadi.errors import CheckpointError, NumericalError


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.lists(st.integers(0, 12), min_size=1, max_size=5), st.integers(0, 2**31))
def test_sum_over_batches_equals_the_gram_of_all_rows_and_merging_is_additive(width, sizes, seed):
    rng = np.random.default_rng(seed)
    parts = [torch.from_numpy(rng.normal(size=(n, width)).astype(np.float32)) for n in sizes]
    whole, left, right = Gram("x", width), Gram("x", width), Gram("x", width)
    for index, part in enumerate(parts):
        whole.add(part)
        (left if index % 2 else right).add(part)
    left.merge(right)
    x = torch.cat(parts).double()
    assert whole.n_tokens == left.n_tokens == len(x)
    torch.testing.assert_close(whole.matrix, x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.matrix, whole.matrix, rtol=1e-12, atol=1e-12)
    assert torch.equal(whole.matrix, whole.matrix.T)


def test_leading_dimensions_are_tokens():
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    folded, flat = Gram("x", 5), Gram("x", 5)
    folded.add(x)
    flat.add(x.reshape(6, 5))
    assert folded.n_tokens == 6
    assert torch.equal(folded.matrix, flat.matrix)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_bad_activations_stop_with_the_layers_name(bad):
    x = torch.ones(4, 3)
    x[1, 2] = bad
    with pytest.raises(NumericalError, match=r"model\.layers\.7"):
        Gram("model.layers.7", 3).add(x)


def test_save_and_load_are_exact(tmp_path):
    gram = Gram("x", 4)
    gram.add(torch.randn(7, 4, generator=torch.Generator().manual_seed(1)))
    gram.save(tmp_path / "g.safetensors")
    again = Gram.load(tmp_path / "g.safetensors")
    assert torch.equal(again.matrix, gram.matrix)
    assert again.n_tokens == 7


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "g.safetensors"
    Gram("x", 4).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="not a saved Gram"):
        Gram.load(path)
    with pytest.raises(CheckpointError):
        Gram.load(tmp_path / "missing")


def test_grams_of_different_widths_do_not_merge():
    with pytest.raises(ValueError, match="cannot merge"):
        Gram("x", 4).merge(Gram("x", 5))


@given(st.integers(0, 40))
@settings(deadline=None)
def test_half_of_a_symmetric_matrix_is_the_whole(size):
    lower = torch.randn(size, size, dtype=torch.float64).tril()
    matrix = lower + lower.tril(-1).T
    folded = fold(matrix)
    assert folded.numel() <= size * (size + 1) // 2 + (size + 1) // 2
    assert torch.equal(unfold(folded, size), matrix)
    with pytest.raises(ValueError, match=f"matrix of {size + 2} rows"):
        unfold(folded, size + 2)
