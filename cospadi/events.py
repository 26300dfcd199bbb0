"""What a run tells a listener while it works."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Event:
    """One thing that happened.

    Attributes
    ----------
    event : str
        Its name, which stays the same from version to version.
    """

    event: ClassVar[str]

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values: ``event`` and the fields."""
        return {"event": self.event, **asdict(self)}


class _Counted(Event):
    """What every child of ``Progress`` has; apart from it, so that children order their own fields."""

    done: int
    total: int
    resumed: bool


@dataclass(frozen=True, kw_only=True)
class Progress(_Counted):
    """Progress of a stage: ``done`` of ``total``; ``done`` = 0 says that the stage begins.

    Attributes
    ----------
    stage : str
        Of the run.
    done, total : int
        In whatever the stage goes through.
    work_done, work_total : float
        By what it costs, in a unit of the stage's own: time left can then be told before the largest layers come.  By
        default ``done`` and ``total``.
    resumed : bool
        This step was taken over from an earlier run and cost no time.
    """

    stage: ClassVar[str]
    work_done: float = -1.0
    work_total: float = -1.0

    def __post_init__(self) -> None:
        for work, count in (("work_done", self.done), ("work_total", self.total)):
            if getattr(self, work) < 0:
                object.__setattr__(self, work, float(count))


@dataclass(frozen=True)
class Predicted(Event):
    """The predicted host memory of the run, in bytes, before anything large is read.

    Attributes
    ----------
    baseline : int
        Of the process before the model.
    weights, grams, activations, solving : int
        Of the largest stage each.
    peak : int
        Most at any one time.
    limit : int or None
        What was allowed.
    """

    event: ClassVar[str] = "predicted"
    baseline: int
    weights: int
    grams: int
    activations: int
    solving: int
    peak: int
    limit: int | None = None


@dataclass(frozen=True)
class Calibrated(Progress):
    """Progress of the calibration, counted in ``of``: block passes, or parts."""

    event: ClassVar[str] = "calibrated"
    stage: ClassVar[str] = "calibrating"
    done: int
    total: int
    of: str
    resumed: bool = False


@dataclass(frozen=True)
class Profiled(Progress):
    """Progress of profiling: the menus of ``done`` groups are known."""

    event: ClassVar[str] = "profiled"
    stage: ClassVar[str] = "profiling"
    done: int
    total: int
    resumed: bool = False


@dataclass(frozen=True)
class Corrected(Progress):
    """Progress of the corrections: ``done`` sample groups were solved to check the profiles."""

    event: ClassVar[str] = "corrected"
    stage: ClassVar[str] = "correcting"
    done: int
    total: int
    resumed: bool = False


@dataclass(frozen=True)
class PlannedUnit:
    """A group of the plan: its name, how it is stored, and the relative cost of solving it."""

    name: str
    kind: str
    cost: float


@dataclass(frozen=True)
class Planned(Event):
    """The plan: how each group is stored; solving begins."""

    event: ClassVar[str] = "planned"
    n_layers: int
    n_units: int
    n_factors: int
    n_dense: int
    solver: str
    reason: str
    units: tuple[PlannedUnit, ...] = ()


@dataclass(frozen=True)
class GroupFinished(Progress):
    """A group is factorised and durably written; ``row`` is its entry in report.json."""

    event: ClassVar[str] = "group_finished"
    stage: ClassVar[str] = "solving"
    row: dict[str, Any]
    done: int
    total: int
    seconds: float
    resumed: bool


@dataclass(frozen=True)
class Retried(Event):
    """A task was lost with its worker, or failed, and runs again."""

    event: ClassVar[str] = "retried"
    task: str
    reason: str


@dataclass(frozen=True)
class Written(Event):
    """The checkpoint folder is complete."""

    event: ClassVar[str] = "written"
    path: str


@dataclass(frozen=True)
class Evaluated(Progress):
    """Progress of the closing evaluation."""

    event: ClassVar[str] = "evaluated"
    stage: ClassVar[str] = "evaluating"
    done: int
    total: int
    resumed: bool = False


@dataclass(frozen=True)
class Stopped(Event):
    """The run ended before its end; what is finished is kept.

    Attributes
    ----------
    reason : str
        ``interrupted`` (SIGINT), ``terminated`` (SIGTERM) or the error.
    resume : str or None
        The command that goes on; None where nothing was begun.
    """

    event: ClassVar[str] = "stopped"
    reason: str
    resume: str | None = None


Listener = Callable[[Event], None]
