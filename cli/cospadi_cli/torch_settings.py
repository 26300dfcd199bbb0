"""Devices, dtypes and threads of the commands that measure speed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

DEVICE_HELP = "cpu, cuda or cuda:N; auto uses a GPU if there is one."


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads for a while; None leaves it as it is."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speed_device(name: str) -> "torch.device":
    """Give the device of a name.

    Raises
    ------
    UsageError
        There is no such device here, or speed cannot be measured on it.
    """
    from cospadi.arrays import torch_device
    from cospadi.errors import UsageError

    device = torch_device(name)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: speed is measured on cpu, cuda or cuda:N")
    return device


def torch_dtypes(names: Sequence[str]) -> "tuple[torch.dtype, ...]":
    """Give the dtypes of names, each once."""
    import torch

    return tuple(getattr(torch, name) for name in dict.fromkeys(names))
