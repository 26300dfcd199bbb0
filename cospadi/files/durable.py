"""Files that are whole or not there, and checksums that tell damage.

Every file is written under a temporary name, flushed to disk and renamed.  A record is a sealed JSON file; or a payload
named by its checksum; or a payload with a sealed mark beside it, written after it, that holds its size, its checksum
and some facts: without a mark that fits there is no record.
"""

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cospadi.errors import CospadiError

_CHUNK = 2**20


class StorageError(CospadiError, OSError):
    """A file cannot be written: the disk is full, read-only or broken."""


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn a failed write into one line that says what to do.

    Raises
    ------
    StorageError
        The block raised an error of input or output.
    """
    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(
            f"{path} cannot be written ({reason}): what is finished is kept; free space or make the place writable, "
            "then run again with --resume"
        ) from error


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """Give a path beside another one for what is to be renamed to it, or to a name that its content tells."""
    # Several runs may write the same file of a cache at once: each has a temporary name of its own.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with storing(path):
            yield temporary
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, and be sure that it is on disk.

    Raises
    ------
    StorageError
        It cannot be written; what was there before is still there.
    """
    with temporary_for(path) as temporary:
        temporary.write_bytes(data)
        put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file of the same folder its name, and be sure that it is on disk under it."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if missing, and be sure that they are on disk.

    Raises
    ------
    StorageError
        It cannot be made.
    """
    with storing(path):
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(exist_ok=True)
            _flush_folder(path.parent)


def remove_left_overs(folder: Path, older_than: float = 0.0) -> None:
    """Delete temporary files that interrupted writes left in a folder and below it, older than ``older_than`` s."""
    now = time.time()
    for path in folder.rglob(".*.tmp"):
        # Another run that shares the folder may have finished its file, or deleted it, just now.
        with storing(path), suppress(FileNotFoundError):
            if now - path.stat().st_mtime >= older_than:
                path.unlink()


def seal(content: Any) -> bytes:
    """Give JSON values as the text of a file that tells its own damage; keys are strings."""
    return json.dumps({"sha256": _digest(content), "content": content}).encode()


def unseal(path: Path) -> Any:
    """Read what ``seal`` gave; None when the file is missing, damaged or something else."""
    try:
        data = json.loads(path.read_bytes())
        whole = isinstance(data, dict) and set(data) == {"sha256", "content"}
        return data["content"] if whole and data["sha256"] == _digest(data["content"]) else None
    # A damaged file may nest deeper than Python's stack.
    except (OSError, ValueError, RecursionError):
        return None


def store_payload(path: Path, write: Callable[[Path], object], facts: Mapping[str, Any]) -> None:
    """Write a record: its payload, then its mark.

    Parameters
    ----------
    path : Path
        Of the payload.
    write : callable
        Writes the payload to the path that it is given.
    facts : mapping of str to JSON values
        What the mark says besides size and checksum.

    Raises
    ------
    StorageError
        It cannot be written; there is no record then.
    """
    with temporary_for(path) as temporary:
        write(temporary)
        mark = {**facts, "bytes": temporary.stat().st_size, "sha256": checksum(temporary)}
        put_in_place(temporary, path)
    write_durably(mark_of(path), seal(mark))


def read_mark(path: Path) -> dict[str, Any] | None:
    """Give the mark of a payload; None when there is none, or when it is damaged or of a payload of another size."""
    mark = unseal(mark_of(path))
    try:
        size = path.stat().st_size
    except OSError:
        return None
    fits = isinstance(mark, dict) and mark.get("bytes") == size and isinstance(mark.get("sha256"), str)
    return mark if fits else None


def is_sound(path: Path, mark: Mapping[str, Any]) -> bool:
    """Read a payload once through, and tell whether it is the one that its mark was made for."""
    try:
        return bool(checksum(path) == mark["sha256"])
    except OSError:
        return False


def mark_of(path: Path) -> Path:
    """Give the path of a payload's mark."""
    return path.with_suffix(".json")


def checksum(path: Path) -> str:
    """Give the SHA-256 of a file of any size, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def file_name(name: str) -> str:
    """Give a file name for any text: short, of plain characters, and another for names that differ in case only."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:100]
    return f"{plain}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:16]}"


def _flush_folder(path: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
