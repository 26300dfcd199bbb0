"""Several tasks at once: largest first, and a task whose worker died starts again."""

import abc
import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cospadi.executors.base import Executor, Task, WorkerLostError
from cospadi.executors.outcome import unpack_outcome

RETRIES = 3
"""How often a task is started again after its worker died."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lost:
    """Stands for an outcome: the worker ended first.

    Attributes
    ----------
    reason : str
        What is known of its end; continues "the worker ...".
    again : bool
        Whether another worker may fare better.
    """

    reason: str
    again: bool = True


Outcome: TypeAlias = bytes | memoryview | Lost
"""What ``pack_outcome`` gave in the worker, or that it gave nothing."""


class ParallelExecutor(Executor):
    """Order, retries and errors; a child starts tasks and waits for their outcomes."""

    @abc.abstractmethod
    def _has_room(self) -> bool:
        """Tell whether one more task may be started now."""

    @abc.abstractmethod
    def _start(self, index: int, task: Task) -> None:
        """Start a task; its outcome will bear the index."""

    @abc.abstractmethod
    def _outcomes(self) -> list[tuple[int, Outcome]]:
        """Wait for some outcomes and give them; perhaps none, to have ``_has_room`` asked again."""

    @abc.abstractmethod
    def _stop(self) -> None:
        """End whatever still runs."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Give (index, result) of each task as it finishes, the largest begun first."""
        waiting = deque(sorted(range(len(tasks)), key=lambda index: -tasks[index].cost))
        running: set[int] = set()
        losses: Counter[int] = Counter()
        results: deque[tuple[int, Any]] = deque()
        first_error: Exception | None = None
        try:
            while True:
                # New tasks are started before results are given: workers compute while the caller writes them down.
                while waiting and first_error is None and self._has_room():
                    index = waiting.popleft()
                    try:
                        self._start(index, tasks[index])
                    except Exception as error:  # of its inputs or of pickle: an error of this task like any other
                        first_error = error
                    else:
                        running.add(index)
                while results:
                    yield results.popleft()
                if not running and (first_error is not None or not waiting):
                    break
                finished = deque(self._outcomes())
                while finished:
                    index, outcome = finished.popleft()
                    running.remove(index)
                    try:
                        if isinstance(outcome, Lost):
                            losses[index] += 1
                            _check_retry(tasks[index], outcome, losses[index])
                            self.retried(tasks[index].name, outcome.reason)
                            waiting.appendleft(index)
                        else:
                            results.append((index, unpack_outcome(outcome)))
                    except Exception as error:  # raised below, when what runs has finished
                        first_error = first_error or error
                    del outcome  # it may be large, and the next wait long
            if first_error is not None:
                raise first_error
        finally:
            self._stop()


def _check_retry(task: Task, lost: Lost, losses: int) -> None:
    if not lost.again:
        raise WorkerLostError(f"{task.name}: the worker {lost.reason}")
    if losses > RETRIES:
        raise WorkerLostError(
            f"{task.name}: the worker {lost.reason}, and so did {RETRIES} more that began it again; if memory ran out "
            "there, use fewer workers or larger machines"
        )
    logger.warning(
        "%s: the worker %s; this task may begin again %d times", task.name, lost.reason, RETRIES - losses + 1
    )
