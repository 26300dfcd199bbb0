"""Text to token windows, for calibration and for perplexity."""

import codecs
import hashlib
import io
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.errors import UsageError

EMBEDDED_CALIBRATION = "calibration.txt"
EMBEDDED_EVALUATION = "evaluation.txt"

_READ = 2**16
_PIECE, _LONGEST_PIECE = 200_000, 1_000_000
"""Characters that are tokenized at once: up to a line end, or exactly as many where there is none."""


def read_text(source: str | Path | None, embedded: str = EMBEDDED_CALIBRATION) -> str:
    """Read a whole text; see ``open_text``."""
    return "".join(open_text(source, embedded))


def open_text(source: str | Path | None, embedded: str = EMBEDDED_CALIBRATION) -> Iterator[str]:
    """Give a text part by part, of which no more is read than is taken.

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
        The file is missing, or the dataset cannot be had; when a part is taken, that it is not UTF-8.
    """
    if source is None:
        return iter([(resources.files("cospadi") / "data" / embedded).read_text(encoding="utf-8")])
    if str(source).startswith("hf:"):
        return _read_dataset(str(source), "train" if embedded == EMBEDDED_CALIBRATION else "test")
    try:
        with Path(source).open("rb"):
            return _read_file(Path(source))
    except OSError as error:
        raise UsageError(f"text {str(source)!r} cannot be read: {error.strerror}") from error


def _read_file(path: Path) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
    done = 0
    with path.open("rb") as file:
        while True:
            block = file.read(_READ)
            done += len(block)
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # What it stumbled on begins with the end of the block before, if a character was cut there.
                byte = done - len(error.object) + error.start
                raise UsageError(f"text {str(path)!r} is not UTF-8 (byte {byte})") from error
            if not block:
                return


def _read_dataset(source: str, split: str) -> Iterator[str]:
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
    return (f"\n\n{text}" if index else text for index, text in enumerate(data["text"]))


def token_windows(tokenizer: Any, text: str | Iterable[str], seq_len: int, samples: int | None = None) -> Tensor:
    """Cut a text into windows of tokens, without overlap and without special tokens.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Of the model.
    text : str or iterable of str
        The text, or its parts in order; no more of them are taken than are needed.
    seq_len : int
        Tokens per window.
    samples : int, optional
        Number of windows to take from the start; None takes all full ones.

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
    parts = (text[i : i + _READ] for i in range(0, len(text), _READ)) if isinstance(text, str) else text
    for chunk in _chunks(parts):
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


def _chunks(parts: Iterable[str]) -> Iterator[str]:
    """Join a text's parts and split it anew at line ends, whatever the parts were."""
    waiting = ""
    for part in parts:
        waiting += part
        while True:
            end = waiting.find("\n", _PIECE)
            if end < 0 and len(waiting) < _LONGEST_PIECE:
                break
            end = min(end, _LONGEST_PIECE) if end >= 0 else _LONGEST_PIECE
            yield waiting[:end]
            waiting = waiting[end:]
    if waiting:
        yield waiting


def fingerprint(windows: Tensor) -> str:
    """Give the SHA-256 of token windows, to record what a model was calibrated on."""
    return hashlib.sha256(str(tuple(windows.shape)).encode() + windows.contiguous().numpy().tobytes()).hexdigest()
