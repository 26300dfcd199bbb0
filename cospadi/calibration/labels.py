"""The labels of the loss whose gradients calibration collects, and the gradient at the model's own output.

With labels drawn from the model's predictions the squared gradients are an unbiased estimate of the Fisher information,
which is the curvature of the loss that a compressed model adds.  With the text's own next tokens they are the
"empirical Fisher", which is not (Kunstner, Balles, Hennig 2019, arXiv 1905.12558); it is there for comparison.
"""

import abc
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError

KINDS = ("model", "text")

_CHUNK_ELEMENTS = 1 << 22
"""Logits turned to float32 or float64 at a time: at most 32 MiB, whatever the vocabulary."""


class Labels(abc.ABC):
    """A loss, given by its gradient at the model's output; a token's label depends on nothing but its place.

    Attributes
    ----------
    note : str
        What the loss is, for reports.
    """

    note: str

    @abc.abstractmethod
    def gradient(self, output: Tensor, windows: Tensor, first: int) -> Tensor:
        """Give the gradient of the summed loss at the output.

        Parameters
        ----------
        output : Tensor, shape (n_windows, ..., width)
            Logits or hidden states.
        windows : Tensor, shape (n_windows, seq_len), int64
            The tokens of these windows.
        first : int
            Index of the first of these windows among all of the calibration.

        Returns
        -------
        Tensor, of the output's shape and dtype
        """


class ModelLabels(Labels):
    """Cross-entropy with labels drawn from the predicted distribution, one for every position.

    The label of position t of window i inverts the cumulative distribution at the t-th uniform number of a generator
    seeded with (seed, i): neither the batch nor the order of the windows matters.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.note = f"labels drawn from the model's predictions (Fisher information), seed {seed}"

    def gradient(self, output: Tensor, windows: Tensor, first: int) -> Tensor:
        """Give softmax minus the label's unit vector."""
        draws = [np.random.default_rng([self.seed, first + i]).random(output.shape[1:-1]) for i in range(len(output))]
        uniform = torch.from_numpy(np.stack(draws)).to(output.device).reshape(-1)
        return _cross_entropy_gradient(output, lambda p, rows: _invert(p, uniform[rows]))


class TextLabels(Labels):
    """Cross-entropy of the text's next token; the last position of a window has no label and no loss."""

    note = "labels are the text's next tokens (empirical Fisher)"

    def gradient(self, output: Tensor, windows: Tensor, first: int) -> Tensor:
        """Give softmax minus the next token's unit vector, zero at the last position."""
        following = windows.to(output.device).roll(-1, dims=1).reshape(-1)
        gradient = _cross_entropy_gradient(output, lambda p, rows: following[rows])
        gradient[:, -1] = 0
        return gradient


class GaussianLabels(Labels):
    """Squared error of hidden states read as the means of unit-variance Gaussians, for models without a head.

    A label drawn from that Gaussian differs from its mean by standard normal noise, which is the gradient.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.note = f"no logits: last_hidden_state read as the mean of unit-variance Gaussian labels, seed {seed}"

    def gradient(self, output: Tensor, windows: Tensor, first: int) -> Tensor:
        """Give standard normal noise from generators seeded with (seed, window)."""
        shape = output.shape[1:]
        noise = [np.random.default_rng([self.seed, first + i]).standard_normal(shape) for i in range(len(output))]
        return torch.from_numpy(np.stack(noise)).to(output)


def model_output(result: Any) -> tuple[Tensor, bool]:
    """Give a model's logits and True, or its last hidden states and False.

    Raises
    ------
    UsageError
        It returned neither.
    """
    for name in ("logits", "last_hidden_state"):
        output = getattr(result, name, None)
        if isinstance(output, Tensor):
            return output, name == "logits"
    raise UsageError(f"the model returns {type(result).__name__} with neither logits nor last_hidden_state")


def choose_labels(kind: str, logits: bool, causal: bool, seed: int) -> Labels:
    """Give the loss for a kind of label and of model.

    Parameters
    ----------
    kind : str
        ``model`` or ``text``.
    logits : bool
        Whether the model's output is logits.
    causal : bool
        Whether they predict the next token.
    seed : int
        For labels that are drawn.

    Raises
    ------
    UsageError
        The kind is unknown, or is ``text`` for a model that does not predict the next token.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown labels {kind!r}: expected one of {', '.join(KINDS)}")
    if kind == "text":
        if not (logits and causal):
            raise UsageError("labels 'text' are next tokens, which this model does not predict: use labels 'model'")
        return TextLabels()
    return ModelLabels(seed) if logits else GaussianLabels(seed)


def _cross_entropy_gradient(logits: Tensor, label: Any) -> Tensor:
    """Give softmax minus unit vectors, in chunks of rows; ``label(p, rows)`` gives the labels of a slice of rows."""
    flat = logits.detach().reshape(-1, logits.shape[-1])
    gradient = torch.empty_like(flat)
    step = max(1, _CHUNK_ELEMENTS // flat.shape[-1])
    for start in range(0, len(flat), step):
        rows = slice(start, start + step)
        piece = flat[rows]
        p = piece.to(torch.promote_types(piece.dtype, torch.float32)).softmax(-1)
        if not bool(torch.isfinite(p).all()):
            raise NumericalError(
                "the model's logits hold NaN or infinity: its weights are damaged or its dtype overflows"
            )
        index = label(p, rows)[:, None]
        gradient[rows] = p.scatter_add_(1, index, torch.full_like(index, -1, dtype=p.dtype)).to(gradient.dtype)
    return gradient.reshape(logits.shape)


def _invert(p: Tensor, uniform: Tensor) -> Tensor:
    """Give for each row the first index whose cumulative probability exceeds the uniform number."""
    cumulative = p.cumsum(
        -1, dtype=torch.float64
    )  # in float32 a large vocabulary's sum is off by more than a rare token
    at = (uniform * cumulative[:, -1])[:, None]
    return torch.searchsorted(cumulative, at, right=True)[:, 0].clamp_(max=p.shape[-1] - 1)
