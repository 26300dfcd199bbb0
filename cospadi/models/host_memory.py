"""Memory that the C library keeps although it is free."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PIECE = 2**20


def keep_little() -> None:
    """Have freed pieces of a MiB and more go back to the system at once; by default up to 32 MiB are kept of each."""
    library = _glibc("mallopt")
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _PIECE)
        library.mallopt(_M_TRIM_THRESHOLD, _PIECE)


def trim() -> None:
    """Give back whatever is free between pieces that are in use."""
    library = _glibc("malloc_trim")
    if library is not None:
        library.malloc_trim(0)


def _glibc(name: str) -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, name) else None
