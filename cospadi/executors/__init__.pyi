from .base import Executor, Task, WorkerLostError
from .choose import EXECUTORS, RAY_INPUTS, make_executor
from .local import devices_of_workers
from .threads import available_threads, limited_threads

__all__ = [
    "EXECUTORS",
    "RAY_INPUTS",
    "Executor",
    "Task",
    "WorkerLostError",
    "available_threads",
    "devices_of_workers",
    "limited_threads",
    "make_executor",
]
