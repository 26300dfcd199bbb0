"""How long a run will still take, told from its events."""

from dataclasses import dataclass

from cospadi.events import Event, Progress, Retried


@dataclass
class _Stage:
    """What is known of one stage; taken over work counts as done and not as an example of the speed."""

    work_done: float = 0.0
    work_total: float = 0.0
    fresh_work: float = 0.0
    fresh_seconds: float = 0.0

    @property
    def seconds_left(self) -> float | None:
        if self.work_done >= self.work_total:
            return 0.0
        if self.fresh_work <= 0:
            return None
        return (self.work_total - self.work_done) * self.fresh_seconds / self.fresh_work


class TimeLeft:
    """The time that the stages under way still need, at the speed of what was done so far.

    Every interval between two events counts for the stage of the second one, so that stages may take turns and any
    number of workers may report.  All times are seconds of one clock that the caller reads.

    Parameters
    ----------
    now : float
        When the run began.
    """

    def __init__(self, now: float) -> None:
        self._stages: dict[str, _Stage] = {}
        self._present, self._last = "", now

    def observe(self, event: Event, now: float) -> None:
        """Take in what happened now."""
        if isinstance(event, Retried):
            return  # in the middle of a stage, whose clock runs on
        seconds, self._last = now - self._last, now
        if not isinstance(event, Progress):
            return
        self._present = event.stage
        stage = self._stages.get(event.stage)
        if stage is None or event.done == 0 or event.work_done < stage.work_done:
            stage = self._stages[event.stage] = _Stage()
        if event.done > 0 and not event.resumed:
            stage.fresh_work += event.work_done - stage.work_done
            stage.fresh_seconds += seconds
        stage.work_done, stage.work_total = event.work_done, event.work_total

    def left(self, now: float) -> float | None:
        """Give the seconds left; None as long as the speed of the present stage is not known, or when none is left."""
        present = self._stages.get(self._present)
        if present is None or present.seconds_left is None:
            return None
        known = [stage.seconds_left for stage in self._stages.values() if stage.seconds_left]
        return max(0.0, sum(known) - (now - self._last)) if known else None
