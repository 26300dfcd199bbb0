"""Where a run took place: versions of libraries, and the machine."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from cospadi.backends import processor_name
from cospadi.reporting.schema import Machine


def versions() -> dict[str, str]:
    """Give the versions of the libraries that a result depends on."""
    found = {}
    for name in ("cospadi", "torch", "transformers", "numpy", "scipy", "numba", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> Machine:
    """Describe the machine: processor, cores, threads, GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }
