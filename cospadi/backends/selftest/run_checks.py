"""Checks of the backends on this machine, also on its GPU, which the tests of the package do not need."""

import platform
from collections.abc import Iterator

import torch

from cospadi.arrays import cuda_availability
from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.selftest import gpu as gpu_checks
from cospadi.backends.selftest.examples import examples
from cospadi.backends.selftest.findings import Check
from cospadi.backends.selftest.learners import ksvd
from cospadi.backends.selftest.products import ALLOWED, FEW_TOKENS, TOKENS, products
from cospadi.errors import UnavailableError


def machine(gpu: bool) -> dict[str, str | None]:
    """Give the names of the device, and the versions of torch and CUDA.

    Raises
    ------
    UnavailableError
        A GPU is asked for and there is none.
    """
    found = {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "cuda": None}
    if gpu:
        state = cuda_availability()
        if not state:
            raise UnavailableError(f"{state.reason}: run the self-test without --gpu, or on a machine that has one")
        major, minor = torch.cuda.get_device_capability()
        found["device"] = f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"
        found["cuda"] = torch.version.cuda
    return found


def checks(gpu: bool) -> Iterator[Check]:
    """Run the checks one after the other.

    Parameters
    ----------
    gpu : bool
        Check the GPU, with larger layers, streams, CUDA graphs and memory.

    Yields
    ------
    Check
        As soon as it has ended.

    Raises
    ------
    UnavailableError
        There is no GPU.
    """
    machine(gpu)
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    shown = examples(device, large=gpu)
    for name in BACKENDS.names():
        state = BACKENDS.availability(name)
        if not state:
            yield Check("product", name, "skipped", detail=state.reason)
            continue
        for dtype in ALLOWED:
            yield products(BACKENDS.create(name), Placement(device, dtype), shown, TOKENS if gpu else FEW_TOKENS)
        if gpu:
            yield from gpu_checks.checks(BACKENDS.create(name), device, shown)
    if not gpu:
        for check in gpu_checks.NAMES:
            yield Check(check, "every backend", "skipped", detail="a CPU has none of this: selftest --gpu")
    yield ksvd("ksvd-torch", device)
    yield ksvd("ksvd-cupy", device)
