"""The dense and the compressed model measured in the same way, side by side."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cospadi.evaluation.multiple_choice import Question
from cospadi.evaluation.perplexity import DEFINITION


@dataclass(frozen=True)
class Protocol:
    """What is measured, the same for every model.

    Attributes
    ----------
    text : str
        Name of the evaluation text, for the record.
    windows : Tensor, shape (n_windows, window), int64
        Its tokens.
    prompt : str, optional
        Continued greedily by each model.
    questions : list of Question, optional
        Multiple choice.
    batch_size : int
        Windows per forward pass.
    """

    text: str
    windows: Tensor
    prompt: str | None = None
    questions: list[Question] | None = None
    batch_size: int = 4

    @property
    def batches(self) -> tuple[Tensor, ...]:
        """Give the windows of each forward pass."""
        return self.windows.split(self.batch_size)


def compare(baseline: dict[str, Any] | None, compressed: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """Join two measurements for ``report["evaluation"]``.

    Parameters
    ----------
    baseline : dict or None
        What ``measure_folders`` found of the dense model.
    compressed : dict
        The same of the compressed model.
    protocol : Protocol
        What both were measured with.

    Returns
    -------
    dict
        Both, with ``perplexity_ratio`` = compressed / baseline of the token perplexity.
    """
    ratio = None
    if baseline is not None:
        # Through the likelihoods: they stay finite where a perplexity does not.
        ratio = math.exp(min(700.0, compressed["perplexity"]["mean_nll"] - baseline["perplexity"]["mean_nll"]))
    return {
        "text": protocol.text,
        "definition": DEFINITION,
        "prompt": protocol.prompt,
        "baseline": baseline,
        "compressed": compressed,
        "perplexity_ratio": ratio,
    }
