"""What the commands that evaluate or generate have in common."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cospadi.evaluation import Protocol, Question


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


def protocol(
    model: str | Path,
    name: str,
    text: str | Iterable[str],
    n_tokens: int,
    window: int,
    prompt: str | None = None,
    questions: "list[Question] | None" = None,
) -> "Protocol | None":
    """Cut the evaluation text with the model's tokenizer; None for a model that is not a causal language model.

    Raises
    ------
    UsageError
        There is no such model, or the text is too short.
    """
    from cospadi.calibration import token_windows
    from cospadi.errors import UsageError
    from cospadi.evaluation import Protocol, batch_size
    from cospadi.models import model_class, read_config, read_tokenizer

    config = read_config(model)
    if not model_class(config).can_generate():
        return None
    if window > n_tokens:
        raise UsageError(
            f"the evaluation's {n_tokens} tokens are fewer than one window of {window}: ask for more tokens"
        )
    windows = token_windows(read_tokenizer(model), text, window, n_tokens // window)
    size = batch_size(config.get_text_config().vocab_size, window)
    return Protocol(name, windows, prompt, questions, size)
