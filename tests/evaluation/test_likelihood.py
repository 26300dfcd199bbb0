import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import NumericalError, UsageError
from cospadi.evaluation.likelihood import count_words, perplexity, token_nll
from tests.helpers import ARCHITECTURES, VOCABULARY


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = ARCHITECTURES["llama"]().eval()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # far from uniform, so that a wrong target changes the number
    return made


def windows(n, length, seed=0):
    return torch.randint(VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def slow_nll(model, tokens):
    """One window, one position at a time, in float64: -sum log p(token | tokens before)."""
    total = 0.0
    for position in range(1, len(tokens)):
        with torch.no_grad():
            logits = model(input_ids=tokens[None, :position]).logits[0, -1].double().numpy()
        shifted = logits - logits.max()
        total -= shifted[tokens[position]] - math.log(np.exp(shifted).sum())
    return total


def test_equals_a_plain_loop_in_float64(model):
    tokens = windows(3, 7)
    expected = sum(slow_nll(model, window) for window in tokens) / (3 * 6)
    measured = perplexity(model, tokens)
    assert measured.mean_nll == pytest.approx(expected, rel=1e-5)
    assert measured.token == pytest.approx(math.exp(expected), rel=1e-4)
    assert (measured.n_tokens, measured.window, measured.word) == (18, 7, None)
    assert measured.token > 1.2 * VOCABULARY  # not degenerate: random text is worse than uniform guessing here


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    model = ARCHITECTURES["llama"]()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, windows(2, 9)).token == pytest.approx(VOCABULARY, rel=1e-5)


@settings(deadline=None, max_examples=15)
@given(n=st.integers(1, 5), length=st.integers(2, 12), batch=st.integers(1, 6))
def test_the_batch_size_changes_only_rounding_and_the_mode_is_restored(model, n, length, batch):
    tokens = windows(n, length, seed=n)
    model.train()
    one = perplexity(model, tokens, batch_size=1)
    assert model.training
    model.eval()
    assert perplexity(model, tokens, batch_size=batch).mean_nll == pytest.approx(one.mean_nll, rel=1e-5)


class Spaced:
    """Decodes every token to a letter and every third one to a space before it."""

    def decode(self, ids):
        return "".join(" a" if i % 3 == 0 else "a" for i in range(len(ids)))


def test_word_perplexity_is_the_token_perplexity_to_the_power_of_tokens_per_word(model):
    tokens = windows(2, 9)
    measured = perplexity(model, tokens, Spaced())
    assert measured.n_words == count_words(Spaced(), tokens) == 6
    assert math.log(measured.word) == pytest.approx(math.log(measured.token) * 18 / 6)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), vocabulary=st.integers(2, 50), seed=st.integers(0, 99))
def test_token_nll_does_not_depend_on_the_chunks(
    rows,
    vocabulary,
    seed,
):
    import cospadi.evaluation.likelihood as module

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 5
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_ELEMENTS", 3 * vocabulary)
        pieces = token_nll(logits, targets)
    expected = -logits.double().log_softmax(-1)[torch.arange(rows), targets]
    torch.testing.assert_close(pieces.double(), expected, rtol=1e-5, atol=1e-5)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.zeros(1, 4096, dtype=torch.bfloat16)
    nll = token_nll(logits, torch.tensor([7]))
    assert nll.dtype == torch.float32
    assert float(nll) == pytest.approx(math.log(4096), rel=1e-6)


def test_nan_weights_are_named_as_such():
    model = ARCHITECTURES["llama"]()
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    with pytest.raises(NumericalError, match="NaN or infinite in windows 0 to 1"):
        perplexity(model, windows(2, 5))


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (5,)])
def test_windows_that_predict_nothing_are_refused(model, shape):
    with pytest.raises(UsageError, match="at least 2 tokens"):
        perplexity(model, torch.zeros(shape, dtype=torch.int64))


def test_an_infinite_perplexity_is_null_in_json(model):
    from dataclasses import replace

    measured = perplexity(model, windows(1, 4))
    assert replace(measured, token=math.inf).to_dict()["token"] is None
    assert measured.to_dict()["token"] == measured.token
