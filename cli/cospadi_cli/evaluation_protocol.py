"""What commands that evaluate share: the text, the protocol and the check of the backend."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cospadi.evaluation import Protocol, Question

PROMPT = "The President of the United States said that"
"""What the models continue in the closing evaluation of a compression."""


@dataclass(frozen=True)
class EvaluationText:
    """A text to evaluate on, by its name in reports, and its parts in order."""

    name: str
    parts: Iterable[str]


def open_evaluation_text(source: str | None) -> EvaluationText:
    """Open a file or ``hf:NAME``; None for the package's own text.

    Raises
    ------
    UsageError
        It cannot be read.
    """
    from cospadi.calibration import EMBEDDED_EVALUATION, open_text

    name = source or "the public-domain evaluation text of the package"
    return EvaluationText(name, open_text(source, EMBEDDED_EVALUATION))


def check_backend(name: str) -> None:
    """Refuse a backend that is unknown or cannot run here.

    Raises
    ------
    UsageError
        With the reason.
    """
    from cospadi.backends import BACKENDS
    from cospadi.errors import UnavailableError

    state = BACKENDS.availability(name)
    if not state:
        raise UnavailableError(f"backend {name!r} cannot run here: {state.reason}")


def make_protocol(
    model: str | Path,
    text: EvaluationText,
    n_tokens: int,
    window: int,
    prompt: str | None = None,
    questions: "list[Question] | None" = None,
) -> "Protocol | None":
    """Cut an evaluation text with a model's tokenizer; None for a model that is not a causal language model.

    Parameters
    ----------
    model : str or Path
        A folder or hub id.
    text : EvaluationText
    n_tokens : int
        Tokens to use; an incomplete window is left out.
    window : int
        Tokens per window.
    prompt : str, optional
    questions : list of Question, optional

    Raises
    ------
    UsageError
        There is no such model, or the text is too short.
    """
    from cospadi.calibration import token_windows
    from cospadi.errors import UsageError
    from cospadi.evaluation import Protocol, windows_per_batch
    from cospadi.models import model_class, read_config, read_tokenizer

    config = read_config(model)
    if not model_class(config).can_generate():
        return None
    if window > n_tokens:
        raise UsageError(
            f"the evaluation's {n_tokens} tokens are fewer than one window of {window}: ask for more tokens"
        )
    windows = token_windows(read_tokenizer(model), text.parts, window, n_tokens // window)
    size = windows_per_batch(config.get_text_config().vocab_size, window)
    return Protocol(text.name, windows, prompt, questions, size)
