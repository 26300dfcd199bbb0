"""Text to token windows, for calibration and for perplexity."""

import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import UsageError

EMBEDDED_CALIBRATION = "calibration.txt"
EMBEDDED_EVALUATION = "evaluation.txt"


def read_text(source: str | Path | None, embedded: str = EMBEDDED_CALIBRATION) -> str:
    """Read a text.

    Parameters
    ----------
    source : str, Path or None
        A UTF-8 file; ``hf:DATASET`` or ``hf:DATASET:CONFIG`` for the text column of a Hugging Face dataset (train split
        for calibration, test split for evaluation); None for the text that the package carries.
    embedded : str
        Which of the package's own texts None means; it also selects the split of a dataset.

    Raises
    ------
    UsageError
        The file is missing or not UTF-8, or the dataset cannot be had.
    """
    if source is None:
        return (resources.files("cospadi") / "data" / embedded).read_text(encoding="utf-8")
    if str(source).startswith("hf:"):
        return _read_dataset(str(source), "train" if embedded == EMBEDDED_CALIBRATION else "test")
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"text {str(source)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {str(source)!r} is not UTF-8 (byte {error.start})") from error


def _read_dataset(source: str, split: str) -> str:
    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{source}: reading datasets needs pip install 'cospadi[eval]'") from error
    try:
        data = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the datasets library raises many kinds; each is the user's to see in one line
        raise UsageError(f"{source}: the dataset cannot be had: {' '.join(str(error).split())[:300]}") from error
    if "text" not in data.column_names:
        raise UsageError(f"{source}: no column 'text' (columns: {', '.join(data.column_names)})")
    return "\n\n".join(data["text"])


def token_windows(tokenizer: Any, text: str, seq_len: int, samples: int | None = None) -> Tensor:
    """Cut a text into windows of tokens, without overlap and without special tokens.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Of the model.
    text : str
        The text.
    seq_len : int
        Tokens per window.
    samples : int, optional
        Take the first so many windows; None takes all full ones.

    Returns
    -------
    Tensor, shape (n_windows, seq_len), int64

    Raises
    ------
    UsageError
        The text is shorter than the windows asked for.
    """
    wanted = None if samples is None else samples * seq_len
    ids: list[int] = []
    # In large chunks of whole lines: a tokenizer is slow on one huge string, and mostly only a prefix is wanted.
    for chunk in _chunks(text):
        ids.extend(tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"])
        if wanted is not None and len(ids) >= wanted:
            break
    windows = len(ids) // seq_len if samples is None else samples
    if windows < 1 or len(ids) < windows * seq_len:
        raise UsageError(
            f"the text has {len(ids)} tokens, fewer than {max(windows, 1)} window(s) of {seq_len}: "
            "give a longer text or ask for fewer or shorter windows"
        )
    return torch.tensor(ids[: windows * seq_len], dtype=torch.int64).reshape(windows, seq_len)


def _chunks(text: str, size: int = 200_000) -> list[str]:
    """Split at line ends into pieces of about ``size`` characters whose concatenation is the text."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + size)
        end = len(text) if end < 0 else end
        pieces.append(text[start:end])
        start = end
    return pieces


def fingerprint(windows: Tensor) -> str:
    """Give the SHA-256 of token windows, to record what a model was calibrated on."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.contiguous().numpy().tobytes()).hexdigest()
