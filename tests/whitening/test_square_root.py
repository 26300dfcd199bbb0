import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.whitening.square_root import corrected_weight, output_errors, whitening_from_gram


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


def shifted(seed, tokens, width):
    """Dense inputs, inputs behind a compressed prefix, a weight."""
    old, weight = sample(seed, tokens, width)
    return old, old + 0.3 * sample(seed + 1, tokens, width)[0], weight


def correct(old, new, weight, alpha, ridge=0.0):
    whitening = whitening_from_gram(new.T @ new, len(new))
    return corrected_weight(weight, whitening, new.T @ (old - new), alpha, ridge)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 30))
def test_a_corrected_weight_is_the_least_squares_fit_to_the_dense_outputs(seed, width, surplus):
    old, new, weight = shifted(seed, 3 * width + surplus, width)
    best = torch.linalg.lstsq(new, old @ weight).solution
    torch.testing.assert_close(correct(old, new, weight, 1.0), best, rtol=1e-7, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 1))
def test_between_the_two_targets_no_other_weight_does_better(seed, width, alpha):
    old, new, weight = shifted(seed, 3 * width + 2, width)

    def loss(candidate):
        dense, own = old @ weight - new @ candidate, new @ (weight - candidate)
        return float(alpha * dense.square().sum() + (1 - alpha) * own.square().sum())

    found = correct(old, new, weight, alpha)
    other = sample(seed + 2, 1, width)[1]
    # For any candidate the loss exceeds the least one by the whitened distance: the ordinary problem.
    excess = float((new @ (found - other)).square().sum())
    assert loss(other) == pytest.approx(loss(found) + excess, rel=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 30), st.floats(1e-3, 10))
def test_the_ridge_holds_the_correction_to_the_weight(seed, width, tokens, ridge):
    old, new, weight = shifted(seed, tokens, width)
    damping = whitening_from_gram(new.T @ new, tokens).damping  # of few tokens; it adds to the ridge
    level = (damping + ridge * (1 + damping)) * float(new.square().sum()) / width
    # Rows that ask for W' = W, as strongly as the ridge says, beside the rows of the fit.
    rows = torch.cat([new, level**0.5 * torch.eye(width, dtype=new.dtype)])
    best = torch.linalg.lstsq(rows, torch.cat([old @ weight, level**0.5 * weight])).solution
    torch.testing.assert_close(correct(old, new, weight, 1.0, ridge), best, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0, 0.4, 1])
def test_equal_inputs_or_no_share_of_the_dense_outputs_leave_the_weight_as_it_is(alpha):
    old, new, weight = shifted(0, 20, 6)
    assert torch.equal(correct(new, new, weight, alpha), weight)
    assert torch.equal(correct(old, new, weight, alpha), weight) == (alpha == 0)
    single = weight.float()
    assert torch.equal(correct(new, new, single, alpha), single.double())


def test_few_tokens_fit_the_dense_outputs_and_leave_unseen_directions_alone():
    old, new, weight = shifted(0, 4, 9)
    new[:, 2] = 0
    found = correct(old, new, weight, 1.0)
    torch.testing.assert_close(new @ found, old @ weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[2], weight[2], rtol=1e-6, atol=1e-6)
    # What changed lies in the span of the tokens.
    inside = torch.linalg.pinv(new) @ new
    torch.testing.assert_close(inside @ (found - weight), found - weight, rtol=1e-6, atol=1e-6)


def test_a_layer_without_tokens_keeps_its_weight():
    weight = sample(0, 1, 4)[1]
    whitening = whitening_from_gram(torch.zeros(4, 4), 0)
    assert torch.equal(corrected_weight(weight, whitening, torch.zeros(4, 4)), weight)


def test_bad_corrections_are_refused():
    old, new, weight = shifted(0, 20, 3)
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="expected 0"):
            correct(old, new, weight, alpha)
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="ridge"):
            correct(old, new, weight, 1.0, ridge)
    whitening = whitening_from_gram(new.T @ new, 20)
    with pytest.raises(NumericalError, match="shift"):
        corrected_weight(weight, whitening, torch.full((3, 3), float("inf")))
