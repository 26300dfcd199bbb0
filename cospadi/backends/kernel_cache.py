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
    """Give the name of an entry: a digest of the sources, options and versions that it depends on."""
    digest = hashlib.sha256(_MAGIC)
    for part in parts:
        data = part.encode()
        # The length keeps the parts apart: ("a", "bc") and ("ab", "c") get different digests.
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read(key: str) -> bytes | None:
    """Give the bytes stored under a key, or None if there are none or they are damaged or cannot be read."""
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
    """Store bytes under a key; a failure is logged and no error."""
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{key}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(_MAGIC + hashlib.sha256(data).digest() + data)
            # Other processes store the same kernel under the same key.  The last one wins; readers see whole files.
            os.replace(name, file)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:
        logger.info("compiled kernels are not cached: %s", error)


def _file(key: str) -> Path:
    # Raises RuntimeError for a user who has no home folder.
    return cache_folder() / "kernels" / f"{key}.bin"
