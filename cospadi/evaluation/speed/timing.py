"""Clocks, contenders that take turns, and medians of their times."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a piece of work and gives the seconds that it took."""
Name = TypeVar("Name")


def wall_clock(work: Call) -> float:
    """Time work on the CPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cuda_clock(work: Call) -> float:
    """Time work on the current GPU, by events around it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    """Give the clock for work on a device."""
    return cuda_clock if device.type == "cuda" else wall_clock


@dataclass
class Rotation:
    """The same call on several copies of its weights, one copy after the other.

    Attributes
    ----------
    calls : sequence of callable
        One per copy.
    at_once : int
        Calls that belong together: 1, or for a CUDA graph of all copies their number.
    """

    calls: Sequence[Call]
    at_once: int = 1
    _next: int = 0

    def run(self, count: int) -> None:
        """Make ``count`` calls, beginning at the copy after the last one."""
        calls, start = self.calls, self._next
        for index in range(start, start + count):
            calls[index % len(calls)]()
        self._next = (start + count) % len(calls)


def take_turns(
    contenders: Mapping[Name, Rotation], clock: Clock, repeats: int, turn_seconds: float = 0.1
) -> dict[Name, list[float]]:
    """Time contenders in turns, so that a disturbance of the machine affects all of them alike.

    In every repeat each contender has one turn: a pass over its copies, cut short if it takes longer than
    ``turn_seconds``.  Each repeat begins with another contender.

    Parameters
    ----------
    contenders : mapping to Rotation
        By name.
    clock : Clock
    repeats : int
    turn_seconds : float

    Returns
    -------
    dict to list of float
        By name, seconds per call, one entry per repeat; the entries of a repeat belong together.
    """
    counts = {}
    for name, rotation in contenders.items():
        rotation.run(1)  # compiles and allocates
        once = clock(partial(rotation.run, 1))
        counts[name] = max(1, min(len(rotation.calls), int(turn_seconds / once) if once > 0 else 1))
        rotation.run(counts[name])
    names = list(contenders)
    found: dict[Name, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            rotation, count = contenders[name], counts[name]
            seconds = clock(partial(rotation.run, count))
            found[name].append(seconds / (count * rotation.at_once))
    return found


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Give the median and the quartiles of values, all the same for a single value."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Give the median over the repeats of time / other time of the same repeat.

    Unlike a ratio of medians, it does not change with noise that slows a whole repeat.
    """
    return statistics.median(time / other for time, other in zip(times, others, strict=True))
