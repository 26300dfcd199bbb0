"""Properties of the machine: its last-level cache, memory bandwidth and rate of matrix products."""

from pathlib import Path

import torch

from cospadi.evaluation.speed.timing import Clock, clock_of

_ASSUMED_CACHE_BYTES = 32 << 20
"""Taken where the system does not give the size."""


def cache_bytes(device: torch.device) -> int:
    """Give the size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return _processor_cache(Path("/sys/devices/system/cpu/cpu0/cache"))


def _processor_cache(folder: Path) -> int:
    sizes = []
    for index in folder.glob("index*"):
        try:
            text = (index / "size").read_text(encoding="ascii").strip()
        except OSError:
            continue
        factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        if digits.isdigit():
            sizes.append(int(digits) * factor)
    return max(sizes, default=_ASSUMED_CACHE_BYTES)


def bandwidth(device: torch.device, n_bytes: int = 1 << 28, repeats: int = 25, clock: Clock | None = None) -> float:
    """Measure the bytes per second that memory delivers: by the sum of a large tensor on a CPU, by a copy on a GPU.

    The result is the best of the repeats.  A kernel may still be slightly faster.
    """
    clock, big = clock or clock_of(device), torch.ones(n_bytes // 4, device=device)
    if device.type == "cuda":
        other = torch.empty_like(big)
        moved, work = 2 * n_bytes, lambda: other.copy_(big)
    else:
        moved, work = n_bytes, lambda: big.sum()
    work()
    return moved / min(clock(work) for _ in range(repeats))


def product_rate(
    device: torch.device, dtype: torch.dtype, size: int = 0, repeats: int = 5, clock: Clock | None = None
) -> float:
    """Measure the floating-point operations per second of torch's product of two large matrices.

    Parameters
    ----------
    device, dtype
        Of the matrices.
    size : int
        Their rows and columns; 0 takes 1024 on a CPU and 8192 on a GPU.
    """
    clock, size = clock or clock_of(device), size or (8192 if device.type == "cuda" else 1024)
    one = torch.full((size, size), 0.5, dtype=dtype, device=device)
    work = lambda: one @ one  # noqa: E731
    work()
    return 2 * size**3 / min(clock(work) for _ in range(repeats))
