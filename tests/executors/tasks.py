"""Tasks that workers can import; what they did is told by their results and by files."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_info

from cospadi.errors import CheckpointError, NumericalError
from cospadi.executors import Task


def task(index, run, *arguments, cost=1.0, inputs=None):
    return Task(f"layer.{index}", cost, partial(run, *arguments), inputs)


def collect(executor, tasks, found=None):
    """Give results by index, each exactly once; ``found`` keeps those from before an error."""
    found = {} if found is None else found
    for index, result in executor.run(tasks):
        assert index not in found
        found[index] = result
    return found


def product(seed, device, inputs):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(65, 70, generator=generator)
    return (left @ inputs, np.linalg.svd(left.numpy())[1])


def matrix(seed):
    return torch.randn(70, 33, generator=torch.Generator().manual_seed(seed))


def process_of_inputs():
    return os.getpid()


def processes(device, inputs):
    return inputs, os.getpid()


def threads(device, inputs):
    import numba

    pools = {(pool["user_api"], pool["prefix"]): pool["num_threads"] for pool in threadpool_info()}
    return torch.get_num_threads(), numba.get_num_threads(), pools


def device(device, inputs):
    return device


def writable(device, inputs):
    array, tensor = inputs
    array += 1
    tensor += 1
    return array, tensor


def arrays():
    return np.zeros(300_000), torch.zeros(300_000)


def note(folder, name, device, inputs):
    """Leave a file that says that this began, with the time's order in its name."""
    (Path(folder) / f"{time.monotonic_ns():020d} {name}").touch()
    return name


def begun(folder):
    return [path.name.split(" ", 1)[1] for path in sorted(Path(folder).iterdir())]


def wait_for(condition):
    """Wait; what never comes is an error long before the whole run of tests is given up."""
    end = time.monotonic() + 200
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)


def die_once(marker, value, device, inputs):
    marker = Path(marker)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value, os.getpid()


def die_always(folder, device, inputs):
    (Path(folder) / f"died {time.monotonic_ns()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code, device, inputs):
    os._exit(code)


def fail(kind, device, inputs):
    raise {
        "numerical": NumericalError("layer.7: 3 values are NaN"),
        "foreign": AwkwardError("a", "b"),
        "value": ValueError("plain"),
    }[kind]


def fail_to_read():
    raise CheckpointError("shard 3 is cut short")


def give_lambda(device, inputs):
    return lambda: 1


class AwkwardError(Exception):
    """Cannot be pickled: its arguments are not what it was made of."""

    def __init__(self, what, why):
        super().__init__(f"{what} because {why}")


def fail_when(path, device, inputs):
    wait_for(Path(path).exists)
    raise NumericalError("layer.7: 3 values are NaN")


def touch_and_wait(mine, other, value, device, inputs):
    """Say that this runs, and finish when another file is there."""
    Path(mine).touch()
    wait_for(Path(other).exists)
    return value


def meet(mine, other, device, inputs):
    return touch_and_wait(mine, other, device, device, inputs)


def hold(folder, go, device, inputs):
    """Tell the process by a file, then run until told to finish."""
    (Path(folder) / str(os.getpid())).touch()
    wait_for(Path(go).exists)
    return os.getpid()


def hold_on_node(folder, go, device, inputs):
    """Tell the Ray node by a file, then run until told to finish; give the node."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (Path(folder) / f"{time.monotonic_ns()} {node}").touch()
    wait_for(Path(go).exists)
    return node
