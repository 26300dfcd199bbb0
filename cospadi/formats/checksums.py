"""``SHA256SUMS``: what the files that decide a model were when they were written; see docs/format.md, section 8.

The file is that of ``sha256sum``, so ``sha256sum -c SHA256SUMS`` checks it too.
"""

import os
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from cospadi.errors import CheckpointError
from cospadi.files import checksum, file_in, shown, write_durably

CHECKSUMS = "SHA256SUMS"

_DECIDING = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*config*.json",  # config.json, generation_config.json, tokenizer_config.json; adapters, which change the model
    "adapter_model*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
)
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
_MAX_BYTES = 2**22
_WHAT_TO_DO = f"download the checkpoint again; if you changed it on purpose, delete {CHECKSUMS}"


def decides(name: str) -> bool:
    """Tell by its name whether a file of a checkpoint decides what the model is: weights, configuration, tokenizer."""
    return not name.startswith(".") and any(fnmatchcase(name, pattern) for pattern in _DECIDING)


def write_checksums(folder: str | Path) -> None:
    """Write SHA256SUMS over the files of a finished checkpoint, durably; it replaces one that is there.

    Raises
    ------
    StorageError
        It cannot be written.
    """
    folder = Path(folder)
    lines = [f"{checksum(folder / name)}  {name}\n" for name in _deciding_files(folder)]
    write_durably(folder / CHECKSUMS, "".join(lines).encode())


def check_checksums(folder: str | Path, names: Iterable[str] | None = None) -> bool:
    """Compare the files of a checkpoint with its SHA256SUMS.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    names : iterable of str, optional
        Read only these files; all that are listed if not given.

    Returns
    -------
    bool
        False if the folder has no SHA256SUMS, and so nothing to compare with.

    Raises
    ------
    CheckpointError
        A file differs from what it was, is missing, or decides the model and is not listed; or SHA256SUMS itself is
        damaged.
    """
    folder = Path(folder)
    if not os.path.lexists(folder / CHECKSUMS):
        return False
    listed = _read(folder)
    wanted = set(listed) if names is None else set(names)
    for name in sorted({*_deciding_files(folder), *wanted}):
        if name not in listed:
            raise CheckpointError(f"{folder}: {shown(name)} is not listed in {CHECKSUMS}: {_WHAT_TO_DO}")
    paths = {name: file_in(folder, name) for name in sorted(wanted)}
    # The small files first, which tell soonest.
    for name in sorted(paths, key=lambda name: paths[name].stat().st_size):
        if checksum(paths[name]) != listed[name]:
            raise CheckpointError(f"{paths[name]}: differs from its checksum in {CHECKSUMS}: {_WHAT_TO_DO}")
    return True


def _read(folder: Path) -> dict[str, str]:
    """Give the checksums by file name."""
    path = file_in(folder, CHECKSUMS)
    if path.stat().st_size > _MAX_BYTES:
        raise CheckpointError(f"{path}: larger than {_MAX_BYTES} bytes")
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8") from error
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in listed:
            raise CheckpointError(f"{path}: line {number} is no checksum of another file: {shown(line)}")
        listed[match[2]] = match[1]
    return listed


def _deciding_files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if decides(path.name) and not path.is_dir())
