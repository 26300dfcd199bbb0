"""What a run tells a listener while it works."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Planned:
    """The groups and their sizes are known; work begins."""

    n_groups: int
    n_layers: int
    n_blocks: int
    solver: str
    reason: str


@dataclass(frozen=True)
class BlockCalibrated:
    """The Grams of one block are collected."""

    block: int
    n_blocks: int


@dataclass(frozen=True)
class GroupFinished:
    """A group is factorised and durably written; ``row`` is its entry in report.json."""

    row: dict[str, Any]
    done: int
    total: int
    seconds: float
    resumed: bool


@dataclass(frozen=True)
class Written:
    """The checkpoint folder is complete."""

    path: str


Event = Planned | BlockCalibrated | GroupFinished | Written
Listener = Callable[[Event], None]
