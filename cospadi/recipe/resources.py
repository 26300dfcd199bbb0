"""Where a run works, and within how much memory."""

import math
import re
from dataclasses import dataclass
from typing import Literal

from cospadi.errors import UsageError

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True)
class Execution:
    """Where a run works, and within how much memory; never changes its result.

    Attributes
    ----------
    max_memory : int, optional
        Bytes of host memory that each process may take, see ``parse_size``; None sets no limit.
    executor : {"local", "ray"}
        Processes of this machine, or a Ray cluster.
    workers : int, optional
        Tasks at a time; None leaves it to the executor.
    threads : int, optional
        Threads of one task; None leaves it to the executor.
    ray_address : str, optional
        Cluster to join, such as ``auto`` or ``host:6379``; None starts one on this machine.
    ray_inputs : {"shared", "object-store"}
        How weights and Grams reach a worker: from a folder that all machines see, or through Ray.

    Raises
    ------
    UsageError
        A value is not allowed, or belongs to another executor.
    """

    max_memory: int | None = None
    executor: Literal["local", "ray"] = "local"
    workers: int | None = None
    threads: int | None = None
    ray_address: str | None = None
    ray_inputs: Literal["shared", "object-store"] = "shared"

    def __post_init__(self) -> None:
        for name in ("max_memory", "workers", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value}: expected at least 1")
        if self.executor not in ("local", "ray"):
            raise UsageError(f"executor={self.executor!r}: expected 'local' or 'ray'")
        if self.ray_inputs not in ("shared", "object-store"):
            raise UsageError(f"ray_inputs={self.ray_inputs!r}: expected 'shared' or 'object-store'")
        if self.executor != "ray" and (self.ray_address is not None or self.ray_inputs != "shared"):
            raise UsageError("ray_address and ray_inputs are for executor 'ray': choose it, or leave them out")


def parse_size(text: str) -> int:
    """Give the bytes that a text such as 8GiB, 500MiB, 8GB or 8e9 stands for.

    1 kB is 1000 bytes and 1 KiB 1024; case does not matter, and a number alone counts bytes.

    Raises
    ------
    UsageError
        It reads otherwise, or is less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:e[+-]?\d+)?|\.\d+)\s*([kmgt]?i?b|)\s*", text, re.IGNORECASE | re.ASCII)
    number = float(match[1]) if match else math.nan
    unit = _UNITS.get(match[2].lower()) if match else None
    if unit is None or not 1 <= number * unit < 2**63:
        raise UsageError(f"size {text!r}: expected a number of bytes such as 8GiB, 500MiB, 8GB or 8e9")
    return int(number * unit)
