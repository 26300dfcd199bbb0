"""What a run tells a listener while it works."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Planned:
    """It is known how each group is stored; solving begins."""

    n_layers: int
    n_units: int
    n_factors: int
    n_dense: int
    solver: str
    reason: str


@dataclass(frozen=True)
class Calibrated:
    """So much of the calibration is done, counted in ``windows`` or ``blocks``."""

    done: int
    total: int
    of: str


@dataclass(frozen=True)
class Profiled:
    """The menus of so many groups are known."""

    done: int
    total: int


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


Event = Planned | Calibrated | Profiled | GroupFinished | Written
Listener = Callable[[Event], None]
