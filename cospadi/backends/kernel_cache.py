"""Compiled kernels on the user's disk, each stored with a digest of its own bytes."""

import hashlib
import logging
import os
import tempfile
from pathlib import Path

from cospadi.files import cache_folder

_MAGIC = b"cospadi-kernels-1\n"
_DIGEST_BYTES = hashlib.sha256().digest_size

logger = logging.getLogger(__name__)


def key_of(*parts: str) -> str:
    """Give the name of an entry: a digest of what it was made from."""
    digest = hashlib.sha256(_MAGIC)
    for part in parts:
        data = part.encode()
        # The length, so that no text can move from one part to the next and keep the digest.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read(key: str) -> bytes | None:
    """Give what was stored under a key, or None if there is nothing, nothing whole, or no way to read it."""
    try:
        stored = _file(key).read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, RuntimeError) as error:
        logger.info("the cache of compiled kernels cannot be read: %s", error)
        return None
    start = len(_MAGIC) + _DIGEST_BYTES
    head, data = stored[:start], stored[start:]
    if head != _MAGIC + hashlib.sha256(data).digest():
        logger.info("the cached kernel %s is damaged: compiling again", key)
        return None
    return data


def write(key: str, data: bytes) -> None:
    """Store bytes under a key; where that is not possible, say so in the log and go on."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{key}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_MAGIC + hashlib.sha256(data).digest() + data)
            # Whoever else stores the same key stores the same kernel: the last one wins, and readers see a whole file.
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        logger.info("compiled kernels are not cached: %s", error)


def _file(key: str) -> Path:
    # Raises RuntimeError for a user who has no home folder.
    return cache_folder() / "kernels" / f"{key}.bin"
