"""Where tasks run: in this process, in several of this machine, or on a Ray cluster."""

from typing import Literal

import torch

from cospadi.errors import UnavailableError, UsageError
from cospadi.executors.base import Executor
from cospadi.executors.local import LocalExecutor, SerialExecutor, devices_of_workers
from cospadi.executors.threads import available_threads
from cospadi.registry import nearest

EXECUTORS = ("local", "ray")
RAY_INPUTS = ("shared", "object-store")


def make_executor(
    name: str,
    *,
    device: str | torch.device,
    workers: int | None = None,
    threads: int | None = None,
    ray_address: str | None = None,
    ray_inputs: Literal["shared", "object-store"] = "shared",
) -> Executor:
    """Give the executor of a name; whatever it needs is checked here, before any work.

    Parameters
    ----------
    name : str
        ``"local"`` or ``"ray"``.
    device : str or torch.device
        What tasks are told to use.  Plain ``"cuda"`` means all GPUs, one per worker.
    workers : int, optional
        Tasks at once.  Without it one on a CPU and one per GPU; with Ray as many as the cluster takes.
    threads : int, optional
        Threads of each task.  Without it those of this process divided among the workers; with Ray one.
    ray_address : str, optional
        The cluster: ``"auto"``, ``"host:port"`` or ``"ray://host:port"``.  Without it Ray is started here, for this
        executor only.
    ray_inputs : str
        ``"shared"``: workers read inputs themselves, from storage that all nodes share.  ``"object-store"``: this
        process reads them and Ray carries them over.

    Raises
    ------
    UsageError
        An argument is not allowed.
    UnavailableError
        Ray is not installed, the cluster is out of reach, or there is no GPU.
    """
    if name not in EXECUTORS:
        raise UsageError(f"unknown executor {name!r}{nearest(name, list(EXECUTORS))}")
    for what, number in (("workers", workers), ("threads", threads)):
        if number is not None and number < 1:
            raise UsageError(f"{what} must be at least 1, not {number}")
    if ray_inputs not in RAY_INPUTS:
        raise UsageError(f"unknown ray inputs {ray_inputs!r}{nearest(ray_inputs, list(RAY_INPUTS))}")
    if name == "ray":
        from cospadi.executors.ray import RayExecutor

        return RayExecutor(str(device), workers=workers, threads=threads, address=ray_address, inputs=ray_inputs)
    if ray_address is not None or ray_inputs != "shared":
        raise UsageError("a Ray address and Ray inputs are for executor ray, not local: choose it, or leave them out")
    n_gpus = 0
    if torch.device(device).type == "cuda":
        n_gpus = torch.cuda.device_count()
        if n_gpus == 0:
            raise UnavailableError(f"device {str(device)!r} cannot be used: torch finds no CUDA GPU on this machine")
    devices = devices_of_workers(str(device), n_gpus, workers)
    threads = threads or max(1, available_threads() // len(devices))
    return SerialExecutor(devices[0], threads) if len(devices) == 1 else LocalExecutor(devices, threads)
