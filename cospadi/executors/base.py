"""The contract of an executor, and its tasks."""

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from cospadi.errors import CospadiError
from cospadi.executors.threads import limited_threads


class WorkerLostError(CospadiError, RuntimeError):
    """A worker process, or its machine, ended in the middle of a task, again and again."""


@dataclass(frozen=True)
class Task:
    """One piece of work that depends on no other.

    Attributes
    ----------
    name : str
        The layer or group, for messages.
    cost : float
        How long it takes against the others, in any unit; where several run at once the largest is started first.
    run : callable (device, inputs) -> result
        Is given the torch device to use, such as ``"cuda:1"``, and what ``inputs`` gave, else None.  Picklable, and
        so is its result.  A pickled tensor carries the whole storage behind it: clone a view before giving it back.
    inputs : callable () -> inputs, optional
        Reads what the task needs.  Picklable.
    """

    name: str
    cost: float
    run: Callable[[str, Any], Any]
    inputs: Callable[[], Any] | None = None

    def read(self) -> Any:
        """Give the inputs, None when it needs none."""
        return None if self.inputs is None else self.inputs()


class Executor(abc.ABC):
    """Runs tasks; a context manager that ends its workers.

    Attributes
    ----------
    threads : int
        Threads of every task: torch, BLAS, OpenMP and numba.  The bytes of a result depend on it, and on nothing
        else here: neither on the number of workers nor on the order in which tasks finish.
    retried : callable
        Is told the name of a task that begins again, and why.
    """

    threads: int
    retried: Callable[[str, str], None] = staticmethod(lambda task, reason: None)

    @property
    @abc.abstractmethod
    def n_workers(self) -> int:
        """How many tasks run at once, as far as is known now."""

    @abc.abstractmethod
    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Give (index, result) of each task as it finishes; one call at a time.

        After an error of a task no other is started; those that run are finished and given, so that no work is
        lost, and then the first error is raised.  Leaving the iterator early, as Ctrl-C does, stops what runs.

        Raises
        ------
        WorkerLostError
            A task lost its worker too often; the text names the task.
        Exception
            Whatever a task raised, with the same type and text.
        """

    def close(self) -> None:  # noqa: B027  an executor without workers has nothing to end
        """End the workers; harmless when called twice."""

    def __enter__(self) -> "Executor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def perform(task: Task, device: str, threads: int, read: Callable[[], Any]) -> Any:
    """Give the result of a task, run in this process with ``threads`` threads on what ``read`` gives."""
    with limited_threads(threads):
        return task.run(device, read())
