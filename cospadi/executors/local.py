"""Tasks on this machine: in this process, or in several."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from cospadi.executors.base import Executor, Task, perform
from cospadi.executors.outcome import pack_outcome
from cospadi.executors.parallel import Lost, Outcome, ParallelExecutor

_SECONDS_TO_LEAVE = 5.0
"""What an idle worker is given to end by itself before it is killed."""


def devices_of_workers(device: str, n_gpus: int, workers: int | None) -> list[str]:
    """Give the torch device of each worker: plain ``"cuda"`` deals out the GPUs, one each unless told otherwise."""
    devices = [f"cuda:{index}" for index in range(n_gpus)] if device == "cuda" and n_gpus > 1 else [device]
    return [devices[worker % len(devices)] for worker in range(workers or len(devices))]


class SerialExecutor(Executor):
    """Runs the tasks in this process, one after the other in the order given.

    Parameters
    ----------
    device : str
        The torch device that tasks are told to use.
    threads : int
        Threads of a task; between tasks the caller's numbers hold.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.threads = threads

    @property
    def n_workers(self) -> int:
        """One: this process."""
        return 1

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Give (index, result) of one task after the other."""
        for index, task in enumerate(tasks):
            yield index, perform(task, self.device, self.threads, task.read)


class LocalExecutor(ParallelExecutor):
    """Runs tasks in processes of this machine, which read their inputs themselves.

    The processes are spawned: a script that starts them needs ``if __name__ == "__main__":`` around its work.  They
    end with this process, however it ends.

    Parameters
    ----------
    devices : list of str
        The torch device of each worker.
    threads : int
        Threads of each task.
    """

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        self.devices = tuple(devices)
        self.threads = threads
        self._workers: list[_Worker | None] = [None] * len(self.devices)  # started when first needed

    @property
    def n_workers(self) -> int:
        """One per entry of ``devices``."""
        return len(self.devices)

    def close(self) -> None:
        """End the processes; a later ``run`` starts new ones."""
        workers = [worker for worker in self._workers if worker is not None]
        self._workers = [None] * len(self.devices)
        for worker in workers:
            worker.connection.close()  # which an idle worker takes as the end
        for worker in workers:
            worker.end(0.0 if worker.task is not None else _SECONDS_TO_LEAVE)

    def _has_room(self) -> bool:
        return any(worker is None or worker.task is None for worker in self._workers)

    def _start(self, index: int, task: Task) -> None:
        data = pickle.dumps(task)
        place = next(i for i, worker in enumerate(self._workers) if worker is None or worker.task is None)
        worker = self._workers[place]
        if worker is None:
            worker = self._workers[place] = _Worker(self.devices[place], self.threads)
        worker.give(index, data)

    def _outcomes(self) -> list[tuple[int, Outcome]]:
        busy: dict[Any, _Worker] = {}
        for worker in self._workers:
            if worker is not None and worker.task is not None:
                busy[worker.connection] = busy[worker.process.sentinel] = worker
        outcomes: list[tuple[int, Outcome]] = []
        for worker in dict.fromkeys(busy[thing] for thing in wait(list(busy))):
            task, outcome = worker.task, worker.outcome()
            if task is not None and outcome is not None:
                outcomes.append((task, outcome))
            if isinstance(outcome, Lost):
                self._workers[self._workers.index(worker)] = None
        return outcomes

    def _stop(self) -> None:
        for place, worker in enumerate(self._workers):
            if worker is not None and worker.task is not None:
                self._workers[place] = None
                worker.connection.close()
                worker.end(0.0)


class _Worker:
    """A process and the task that it has, if any."""

    def __init__(self, device: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of BLAS, OpenMP and CUDA
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, device, threads), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.task: int | None = None
        self._ready = False

    def give(self, index: int, task: bytes) -> None:
        self.task = index
        with contextlib.suppress(OSError):  # it has died, which ``outcome`` reports
            self.connection.send_bytes(task)

    def outcome(self) -> bytes | Lost | None:
        """Take what the worker sent; None when that is only that it is ready."""
        try:
            if not self.connection.poll():
                raise EOFError
            data = self.connection.recv_bytes()
        except (EOFError, OSError):  # also in the middle of a result
            return self._lost()
        if not self._ready:
            self._ready = True
            return None
        self.task = None
        return data

    def end(self, seconds: float) -> None:
        """Wait so long for the process to end, then kill it."""
        self.process.join(seconds)
        self.process.kill()
        self.process.join()

    def _lost(self) -> Lost:
        self.connection.close()
        self.end(_SECONDS_TO_LEAVE)
        code = self.process.exitcode or 0
        if code < 0:
            killed = signal.Signals(-code).name
            return Lost(f"was killed ({killed})" + (", perhaps for want of memory" if killed == "SIGKILL" else ""))
        if self._ready:
            return Lost(f"ended with exit code {code}")
        return Lost(
            "process could not start (its own text is above); a script needs "
            'if __name__ == "__main__": around the work that it starts',
            again=False,
        )


def _serve(connection: Connection, device: str, threads: int) -> None:
    """Run tasks until the other end of the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # for libraries that ask for the current GPU
    try:
        connection.send_bytes(b"ready")
        while True:
            data = connection.recv_bytes()
            connection.send_bytes(pack_outcome(partial(_perform, data, device, threads)))
            del data
    except (EOFError, OSError):
        return


def _perform(data: bytes, device: str, threads: int) -> Any:
    task: Task = pickle.loads(data)
    return perform(task, device, threads, task.read)


def _leave_with_parent() -> None:
    """End this process at once when its parent is gone, even a killed one, in the middle of a task too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
