import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError
from cospadi.whitening import output_errors, whitening_from_gram


def sample(seed, tokens, width):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return x, torch.randn(width, 5, generator=generator, dtype=torch.float64)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 30))
def test_whitened_error_is_the_output_error(seed, width, surplus):
    x, weight = sample(seed, 2 * width + surplus, width)
    other = sample(seed + 1, 1, width)[1]
    gram = x.T @ x
    whitening = whitening_from_gram(gram, len(x))
    assert whitening.damping == 0
    expected = float((x @ (weight - other)).square().sum())
    whitened = float((whitening.whiten(weight) - whitening.whiten(other)).square().sum())
    assert whitened == pytest.approx(expected, rel=1e-9)
    assert output_errors(gram, weight, other) == pytest.approx((expected, float((x @ weight).square().sum())), rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12))
def test_unwhiten_undoes_whiten(seed, width):
    x, weight = sample(seed, 3 * width, width)
    whitening = whitening_from_gram(x.T @ x, len(x))
    torch.testing.assert_close(whitening.unwhiten(whitening.whiten(weight)), weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "width", "zeros", "note"),
    [(3, 8, 0, "only 3 tokens for 8 features"), (40, 8, 2, "2 input features are always zero")],
)
def test_singular_grams_are_damped_visibly_and_stay_usable(tokens, width, zeros, note):
    x, weight = sample(0, tokens, width)
    x[:, :zeros] = 0
    whitening = whitening_from_gram(x.T @ x, tokens)
    assert whitening.damping > 0
    assert note in whitening.note
    assert torch.isfinite(whitening.unwhiten(whitening.whiten(weight))).all()
    # The damping is so small that the whitened norm still is the output's.
    ratio = float(whitening.whiten(weight).square().sum() / (x @ weight).square().sum())
    assert ratio == pytest.approx(1, rel=1e-3)


def test_repeated_features_are_noticed():
    x, _ = sample(0, 50, 6)
    x[:, 1] = x[:, 0]
    whitening = whitening_from_gram(x.T @ x, 50)
    assert whitening.damping > 0
    assert "singular" in whitening.note


@pytest.mark.parametrize(("tokens", "text"), [(0, "no calibration token"), (9, "inputs are zero")])
def test_a_layer_that_saw_nothing_falls_back_to_the_plain_weight_error_and_says_so(tokens, text):
    weight = sample(0, 1, 4)[1]
    whitening = whitening_from_gram(torch.zeros(4, 4), tokens)
    assert text in whitening.note
    assert torch.equal(whitening.whiten(weight), weight)
    error, norm = output_errors(torch.zeros(4, 4, dtype=torch.float64), weight, torch.zeros_like(weight))
    assert error == norm > 0


def test_an_indefinite_gram_is_the_last_resort():
    gram = torch.diag(torch.tensor([4.0, 1.0, -0.9], dtype=torch.float64))
    whitening = whitening_from_gram(gram, 10)
    assert "eigenvalues clamped" in whitening.note
    again = whitening.factor @ whitening.factor.T
    torch.testing.assert_close(again[:2, :2], gram[:2, :2], rtol=1e-4, atol=1e-4)
    assert bool((whitening.factor.triu(1) == 0).all())


def test_nan_stops_with_the_name():
    gram = torch.eye(3)
    gram[0, 1] = float("nan")
    with pytest.raises(NumericalError, match=r"layer\.7"):
        whitening_from_gram(gram, 5, name="layer.7")
