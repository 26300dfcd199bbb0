"""The dense and the compressed model measured in the same way, side by side."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cospadi.evaluation.choices import Question, score_choices
from cospadi.evaluation.generation import generate
from cospadi.evaluation.perplexity import DEFINITION, perplexity


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


def measure(model: Any, tokenizer: Any, protocol: Protocol) -> dict[str, Any]:
    """Measure one causal language model.

    Returns
    -------
    dict
        ``perplexity`` (the fields of ``Perplexity``), ``choices`` and ``sample`` (None where the protocol has none) and
        ``dtype``, the precision it ran in.  Plain JSON values.
    """
    measured = perplexity(model, protocol.windows, tokenizer, protocol.batch_size)
    questions = protocol.questions
    return {
        "perplexity": measured.to_dict(),
        "choices": score_choices(model, tokenizer, questions).to_dict() if questions else None,
        "sample": generate(model, tokenizer, protocol.prompt) if protocol.prompt else None,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def compare(baseline: dict[str, Any] | None, compressed: dict[str, Any], protocol: Protocol) -> dict[str, Any]:
    """Join two measurements for ``report["evaluation"]``.

    Parameters
    ----------
    baseline : dict or None
        ``measure`` of the dense model.
    compressed : dict
        ``measure`` of the compressed model.
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
