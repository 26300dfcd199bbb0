"""Devices, dtypes and threads by the names that are typed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICE_HELP = "cpu, cuda or cuda:N; auto takes a GPU if there is one."


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads for a while; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_device(name: str) -> "torch.device":
    """Read the name of a device.

    Raises
    ------
    UsageError
        There is no such device here.
    """
    from cospadi.arrays import torch_device as known_device
    from cospadi.errors import UsageError

    device = known_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: speed is measured on cpu, cuda or cuda:N")
    return device


def torch_dtypes(names: Sequence[str]) -> "tuple[torch.dtype, ...]":
    """Read names of dtypes, each once."""
    import torch

    return tuple(getattr(torch, name) for name in dict.fromkeys(names))
