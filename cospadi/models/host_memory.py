"""The memory of the host: what a process and its model take, and what the C library keeps although it is free."""

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import nn

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_PIECE = 2**20


def keep_small_heap() -> None:
    """Have freed pieces of a MiB and more go back to the system at once; by default up to 32 MiB are kept of each."""
    library = _glibc("mallopt")
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _PIECE)
        library.mallopt(_M_TRIM_THRESHOLD, _PIECE)


def trim_heap() -> None:
    """Give back whatever is free between pieces that are in use."""
    library = _glibc("malloc_trim")
    if library is not None:
        library.malloc_trim(0)


def _glibc(name: str) -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, name) else None


BATCH = 2.0
"""Bytes that a batch's way through a block and back takes, over those of the inputs and outputs of its layers."""


LIBRARIES = 64 * 2**20
"""What libraries load only when they are first used."""


def resident_bytes() -> int:
    """Give what this process has in memory now; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if sys.platform != "linux" or not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def outside_bytes(model: nn.Module, blocks: Sequence[str]) -> list[int]:
    """Give the bytes of the parameters of each module outside the blocks."""
    inside = tuple(f"{name}." for name in blocks)
    return [
        sum(tensor.nbytes for tensor in module.parameters(recurse=False))
        for name, module in model.named_modules()
        if name not in blocks and not name.startswith(inside)
    ]


def loading_bytes(outside: Sequence[int]) -> int:
    """Give what the largest module outside the blocks takes while it is loaded: as stored, and as it is used."""
    return int(1.5 * max(outside, default=0))


def gib(nbytes: int) -> str:
    """Give a number of bytes as a text for people."""
    return f"{nbytes / 2**30:.2f} GiB"
