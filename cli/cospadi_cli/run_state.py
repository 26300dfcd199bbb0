"""The state of a run or of a cache, as values."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Stage:
    """The progress of a stage.

    Attributes
    ----------
    name, of : str
        Its name, and what it counts.
    done : int
    total : int or None
        None if it is not known yet.
    left : list of str
        Names of what is not done.
    seconds : float or None
        None if the stage has not ended.
    """

    name: str
    of: str
    done: int = 0
    total: int | None = None
    left: list[str] = field(default_factory=list)
    seconds: float | None = None


@dataclass
class Files:
    """The records that were looked at: their size, the last change, and the names of damaged ones."""

    bytes: int = 0
    last_activity: float | None = None
    damaged: list[str] = field(default_factory=list)

    def add(self, paths: Iterable[Path]) -> None:
        """Count files; those that do not exist are left out."""
        for path in paths:
            try:
                state = path.stat()
            except FileNotFoundError:
                continue  # a running process replaces its files
            self.bytes += state.st_size
            self.last_activity = max(self.last_activity or 0.0, state.st_mtime)


@dataclass(frozen=True)
class RunState:
    """A run that is going on or was interrupted.

    Attributes
    ----------
    path : str
    process : dict or None
        ``pid`` and ``host`` of the process that holds the folder; the pid is None if it is not known.
    model : str or None
    recipe : dict of str to str, or None
        The ratio, and the fields that differ from the default.
    threads : int or None
    stages : list of Stage
    files : Files
    command : str or None
        Continues the run.
    """

    path: str
    process: dict[str, Any] | None
    model: str | None
    recipe: dict[str, str] | None
    threads: int | None
    stages: list[Stage]
    files: Files
    command: str | None

    @property
    def state(self) -> str:
        """Give ``running`` or ``interrupted``."""
        return "interrupted" if self.process is None else "running"

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        values = asdict(self)
        return {"state": self.state, **values, **values.pop("files")}


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, with the seconds of its stages as far as they are known."""

    path: str
    began: float | None
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return {"state": "finished", **asdict(self)}


@dataclass(frozen=True)
class KeptMeasurements:
    """The measurements of one model and calibration text in a cache.

    Attributes
    ----------
    folder : str
    facts : dict
        What the measurements depend on.
    inputs, texts : int
        Complete statistics of inputs, and complete profiles and corrections.
    files : Files
    """

    folder: str
    facts: dict[str, Any]
    inputs: int
    texts: int
    files: Files


@dataclass(frozen=True)
class CacheState:
    """A folder of --cache."""

    path: str
    measurements: list[KeptMeasurements]

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        parts = [asdict(one) for one in self.measurements]
        kept = [{**part, **part.pop("files")} for part in parts]
        return {"path": self.path, "state": "cache", "measurements": kept}
