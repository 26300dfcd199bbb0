"""Tasks on a Ray cluster, which may lose machines and gain others while they run."""

import logging
import os
import pickle
import socket
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np

from cospadi.errors import UnavailableError, UsageError
from cospadi.executors.base import Task, perform
from cospadi.executors.outcome import pack_outcome
from cospadi.executors.parallel import Lost, Outcome, ParallelExecutor

_SPARE = 2
"""Tasks that wait in the cluster beyond those that it can run: a worker that is free, or a new node, has work at once,
and no more inputs than these lie about."""

_LOOK_AGAIN = 1.0
"""Seconds between looks at which nodes there are."""

_SECONDS_TO_CONNECT = 10.0

logger = logging.getLogger(__name__)


class RayExecutor(ParallelExecutor):
    """Runs each task as a Ray task.

    ``cospadi``, torch and numpy must be installed on every node in the versions that this process has: other versions
    may give other bytes, so workers refuse a task from them.  A Ray that the caller has started or joined is used as
    it is and left running.

    Parameters
    ----------
    device : str
        ``"cpu"``, or ``"cuda"`` for one GPU per task.
    workers : int, optional
        Tasks at once; without it as many as the nodes take.
    threads : int, optional
        Threads of each task, and the CPUs that Ray reserves for it; without it one.
    address : str, optional
        The cluster to join, ``"auto"`` for the one of this machine; without it Ray is started here.
    inputs : str
        ``"shared"``: workers read inputs themselves.  ``"object-store"``: this process reads the inputs of tasks that
        are about to start, and Ray carries them over.

    Raises
    ------
    UsageError
        The device is not for Ray, another cluster is joined already, or no node has enough CPUs.
    UnavailableError
        Ray is not installed, the cluster is out of reach, or it has no GPU.
    """

    def __init__(
        self,
        device: str,
        *,
        workers: int | None = None,
        threads: int | None = None,
        address: str | None = None,
        inputs: str = "shared",
    ) -> None:
        if device not in ("cpu", "cuda"):
            raise UsageError(f"device {device!r} cannot be used with Ray, which assigns the GPUs: choose cpu or cuda")
        self.threads = threads or 1
        self._device = device
        self._workers = workers
        self._put_inputs = inputs == "object-store"
        self._ray = _import_ray()
        n_cpus = self.threads * (workers or max(1, (os.cpu_count() or 1) // self.threads))
        self._ours = _connect(self._ray, address, n_cpus)
        self._tasks: dict[Any, tuple[int, Any]] = {}  # by reference of the outcome: index, reference of the inputs
        self._slots = self._count_slots()
        if not self._slots:
            self.close()
            if device == "cuda":
                raise UnavailableError(
                    f"no node of the Ray cluster has a GPU and {self.threads} CPUs: add one, or choose device cpu"
                )
            raise UsageError(f"no node of the Ray cluster has {self.threads} CPUs: use fewer threads")
        self._run = self._ray.remote(num_cpus=self.threads, num_gpus=int(device == "cuda"), max_retries=0)(_on_worker)

    @property
    def n_workers(self) -> int:
        """As many as the nodes take now, and no more than was asked for."""
        return min(self._slots, self._workers or self._slots)

    def close(self) -> None:
        """Leave the cluster, or end it, where this executor joined or started it."""
        if self._ours:
            self._ours = False
            self._ray.shutdown()

    def _count_slots(self) -> int:
        slots = 0
        for node in self._ray.nodes():
            if node["Alive"]:
                n_cpus, n_gpus = (int(node["Resources"].get(name, 0)) for name in ("CPU", "GPU"))
                slots += min(n_cpus // self.threads, n_gpus if self._device == "cuda" else n_cpus)
        return slots

    def _has_room(self) -> bool:
        most = self._slots + _SPARE
        return len(self._tasks) < min(most, self._workers or most)

    def _start(self, index: int, task: Task) -> None:
        inputs = None
        if self._put_inputs:
            inputs = self._ray.put(np.frombuffer(pickle.dumps(task.read(), protocol=5), np.uint8))
        # Ray's own pickle also takes functions of a script or notebook, which workers cannot import.
        data = self._ray.cloudpickle.dumps(task)
        outcome = self._run.remote(data, inputs, self._device, self.threads, _versions())
        self._tasks[outcome] = (index, inputs)

    def _outcomes(self) -> list[tuple[int, Outcome]]:
        finished, _ = self._ray.wait(list(self._tasks), timeout=_LOOK_AGAIN)
        self._look()
        outcomes: list[tuple[int, Outcome]] = []
        for reference in finished:
            index, _ = self._tasks.pop(reference)  # and with it the inputs, which Ray then drops
            outcomes.append((index, self._fetch(reference)))
        return outcomes

    def _look(self) -> None:
        """See how many tasks the nodes take now."""
        slots, before = self._count_slots(), self._slots
        self._slots = slots
        if slots != before:
            logger.info("the Ray cluster now runs %d tasks at once, not %d", slots, before)
        if before and not slots:
            logger.warning("no node of the Ray cluster can run a task now: waiting for one")

    def _fetch(self, reference: Any) -> memoryview | Lost:
        errors = self._ray.exceptions
        try:
            return memoryview(self._ray.get(reference))
        except errors.RayTaskError as error:  # errors of the task come as its outcome: this is one before it
            last = str(error).strip().splitlines()[-1]
            return Lost(f"could not begin: {last} (is the same cospadi installed on every node?)", again=False)
        except errors.RayError as error:  # of the worker, its node, or the store that held the outcome
            first = (str(error).strip().splitlines() or [""])[0]
            return Lost(f"was lost ({type(error).__name__}: {first})")

    def _stop(self) -> None:
        for reference in self._tasks:
            self._ray.cancel(reference, force=True)
        self._tasks.clear()


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported or started; else it asks
    try:
        import ray
    except ImportError as error:
        raise UnavailableError("Ray is not installed: pip install 'cospadi[ray]'") from error
    return ray


def _connect(ray: ModuleType, address: str | None, n_cpus: int) -> bool:
    """Join a cluster or start one here; tell whether the connection is ours to close."""
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise UsageError(f"this process has joined Ray at {joined} already, not {address}: leave the address out")
        return False
    quiet: dict[str, Any] = {"logging_level": logging.CRITICAL, "log_to_driver": False}
    if address is None:
        ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, **quiet)
        return True
    place = os.environ.get("RAY_ADDRESS", "auto") if address == "auto" else address
    try:
        _probe(place)
        ray.init(address=place, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnavailableError(f"no Ray cluster at {place!r}: {reason}; start one by ray start --head") from error
    return True


def _probe(place: str) -> None:
    """Raise OSError unless something listens there: Ray itself would try for minutes, and not end at Ctrl-C."""
    host, colon, port = place.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS_TO_CONNECT).close()


@lru_cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("cospadi", "torch", "numpy")}


def _on_worker(task: bytes, inputs: Any, device: str, threads: int, versions: dict[str, str]) -> Any:
    """Give the outcome as an array of bytes, which Ray hands over without a copy."""
    outcome = pack_outcome(partial(_perform, task, inputs, device, threads, versions))
    return np.frombuffer(outcome, np.uint8)


def _perform(task: bytes, inputs: Any, device: str, threads: int, versions: dict[str, str]) -> Any:
    check_versions(versions, _versions())
    own: Task = pickle.loads(task)
    read: Callable[[], Any] = own.read if inputs is None else partial(pickle.loads, memoryview(inputs))
    return perform(own, device, threads, read)


def check_versions(asked: dict[str, str], here: dict[str, str]) -> None:
    """Refuse to work with other versions than the process that asks.

    Raises
    ------
    UnavailableError
        The text names the node and the versions that differ.
    """
    other = [f"{name} {here[name]} instead of {asked[name]}" for name in asked if here[name] != asked[name]]
    if other:
        raise UnavailableError(
            f"the Ray node {socket.gethostname()} has {', '.join(other)}, which may give other bytes: install the same"
        )
