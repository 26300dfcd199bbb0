"""What is measured of each model, what was found, and the dense and the compressed model side by side."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from cospadi.evaluation.likelihood import DEFINITION, Perplexity
from cospadi.evaluation.multiple_choice import ChoicesResult, Question


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


@dataclass(frozen=True)
class Measurement:
    """What was measured of one model.

    Attributes
    ----------
    perplexity : Perplexity
    choices : ChoicesResult or None
        None if the protocol has no questions.
    sample : str or None
        Continuation of the protocol's prompt; None if there is no prompt, or if ``note`` gives a reason.
    note : str or None
        Why there is no sample.
    dtype : str
        Precision in which the model ran.
    """

    perplexity: Perplexity
    choices: ChoicesResult | None
    sample: str | None
    note: str | None
    dtype: str

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return asdict(self) | {"perplexity": self.perplexity.to_dict()}


@dataclass(frozen=True)
class Comparison:
    """The measurements of a compressed and, where there is one, of a dense model by the same protocol."""

    protocol: Protocol
    baseline: Measurement | None
    compressed: Measurement

    @property
    def perplexity_ratio(self) -> float | None:
        """Give the token perplexity of the compressed model / that of the baseline; None without a baseline."""
        if self.baseline is None:
            return None
        # Through the likelihoods: they stay finite where a perplexity does not.
        return math.exp(min(700.0, self.compressed.perplexity.mean_nll - self.baseline.perplexity.mean_nll))

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values, as for ``report["evaluation"]``."""
        return {
            "text": self.protocol.text,
            "definition": DEFINITION,
            "prompt": self.protocol.prompt,
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "compressed": self.compressed.to_dict(),
            "perplexity_ratio": self.perplexity_ratio,
        }
