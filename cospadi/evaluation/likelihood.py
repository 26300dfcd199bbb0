"""The likelihood that a causal language model gives to a text, and the perplexity that follows from it.

The field uses two perplexities.  That per token (GPTQ, AWQ, SVD-LLM) depends on the tokenizer.  That per word (lm-eval,
CoSpaDi, ROCKET) does not, and is always larger.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError

DEFINITION = (
    "token: exp of the mean negative log-likelihood (NLL) per token over windows without overlap, the first token of "
    "each window being context only; word: exp of the mean NLL per token times the tokens per whitespace-separated word"
)

_CHUNK_ELEMENTS = 1 << 23
"""Logits turned to float32 at a time: 32 MiB, whatever the vocabulary."""


@dataclass(frozen=True)
class Perplexity:
    """The result of ``perplexity``.

    Attributes
    ----------
    token : float
        exp(mean_nll).
    word : float or None
        exp(mean_nll * tokens per word); None when the words were not counted.
    mean_nll : float
        Mean negative log-likelihood of a predicted token, in nats.
    n_tokens : int
        Predicted tokens: windows times (window - 1).
    n_words : int or None
        Whitespace-separated words of the windows' text.
    window : int
        Tokens per window.
    """

    token: float
    word: float | None
    mean_nll: float
    n_tokens: int
    n_words: int | None
    window: int

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values; an infinite perplexity becomes null, which ``mean_nll`` explains."""
        return {key: None if value == math.inf else value for key, value in asdict(self).items()}


@torch.no_grad()
def perplexity(model: Any, windows: Tensor, tokenizer: Any = None, batch_size: int = 4) -> Perplexity:
    """Measure the perplexity of a causal language model on windows of tokens.

    Parameters
    ----------
    model : transformers causal language model
        Stays on its device; switched to evaluation mode for the call.
    windows : Tensor, shape (n_windows, window), int64
        Windows of the text without overlap, as ``cospadi.calibration.token_windows`` gives them.
    tokenizer : transformers tokenizer, optional
        Counts the words of the text; without it there is no word perplexity.
    batch_size : int
        Windows per forward pass; changes memory and speed, and the result only by rounding.

    Returns
    -------
    Perplexity

    Raises
    ------
    UsageError
        The windows do not predict anything.
    NumericalError
        The model's log-probabilities are NaN or infinite.
    """
    check_windows(windows)
    training = model.training
    model.eval()
    try:
        nlls = list(batch_nlls(model, windows, batch_size))
    finally:
        model.train(training)
    return summarize(nlls, windows, tokenizer)


def check_windows(windows: Tensor) -> None:
    """Refuse windows that do not predict anything.

    Raises
    ------
    UsageError
        There are none, or they are shorter than two tokens.
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"perplexity needs windows of at least 2 tokens, got shape {tuple(windows.shape)}")


def batch_nlls(model: Any, windows: Tensor, batch_size: int, first: int = 0) -> Iterator[float]:
    """Give the summed NLL of one batch after the other, by a model in memory.

    Parameters
    ----------
    model : transformers causal language model
    windows : Tensor, shape (n_windows, window), int64
    batch_size : int
    first : int
        Number of the first window, for error texts.
    """
    for index, batch in enumerate(windows.split(batch_size)):
        batch = batch.to(model.device)
        with torch.no_grad():
            yield batch_nll(model(input_ids=batch, use_cache=False).logits, batch, first + index * batch_size)


def batch_nll(logits: Tensor, batch: Tensor, first: int) -> float:
    """Sum the NLL of a batch's tokens in float64.

    Parameters
    ----------
    logits : Tensor, shape (n_windows, window, vocabulary), floating
    batch : Tensor, shape (n_windows, window), int64
    first : int
        Number of its first window, for the error text.

    Raises
    ------
    NumericalError
        The log-probabilities are NaN or infinite.
    """
    nll = float(token_nll(logits[:, :-1], batch[:, 1:]).sum(dtype=torch.float64))
    if not math.isfinite(nll):
        raise NumericalError(
            f"the model's log-probabilities are NaN or infinite in windows {first} to {first + len(batch) - 1}: its "
            "weights are damaged or its dtype overflows (try float32)"
        )
    return nll


def summarize(nlls: Sequence[float], windows: Tensor, tokenizer: Any = None) -> Perplexity:
    """Give the perplexity from the NLLs of all batches, added up in the order of the text."""
    n_tokens = windows.shape[0] * (windows.shape[1] - 1)
    total = 0.0
    for nll in nlls:  # not by sum(), which Python 3.12 began to compensate
        total += nll
    mean_nll = total / n_tokens
    n_words = None if tokenizer is None else count_words(tokenizer, windows)
    return Perplexity(
        token=_exp(mean_nll),
        word=_exp(mean_nll * windows.numel() / n_words) if n_words else None,
        mean_nll=mean_nll,
        n_tokens=n_tokens,
        n_words=n_words,
        window=windows.shape[1],
    )


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the negative log-likelihood of each target in float32.

    Parameters
    ----------
    logits : Tensor, shape (..., vocabulary), floating
        Turned to float32 in chunks: a whole batch over a large vocabulary would double its memory.
    targets : Tensor, shape (...), int64

    Returns
    -------
    Tensor, shape (...), float32
    """
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    rows = max(1, _CHUNK_ELEMENTS // flat.shape[-1])
    parts = [
        torch.nn.functional.cross_entropy(piece.float(), goal, reduction="none")
        for piece, goal in zip(flat.split(rows), wanted.split(rows), strict=True)
    ]
    return torch.cat(parts).reshape(targets.shape)


def count_words(tokenizer: Any, windows: Tensor) -> int:
    """Count the whitespace-separated words of the windows' text; the windows follow one another in it."""
    return len(tokenizer.decode(windows.reshape(-1).tolist()).split())


def _exp(value: float) -> float:
    """Give exp(value), infinite beyond the range of a float: an infinite perplexity is a valid result."""
    return math.exp(value) if value < 700 else math.inf
