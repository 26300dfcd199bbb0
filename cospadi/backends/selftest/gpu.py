"""Checks that need a GPU: streams, threads, CUDA graphs, waiting and memory."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.backends.base import Backend, Placement
from cospadi.backends.selftest.examples import Example
from cospadi.backends.selftest.findings import Check, Findings, guarded, same_bits
from cospadi.backends.selftest.products import ALLOWED, prepared

NAMES = ("side stream", "other thread", "CUDA graph", "waits for nothing", "memory from torch only")

_TOKENS = (1, 9, 17, 64, 513)
_IN_FEATURES = (130, 200, 512, 4096)
"""Of the layers that are taken: one that fits no tile, its coefficients alone, a group of three, and a large one."""
_BUSY_SIZE, _BUSY_PRODUCTS = 4096, 8
"""Products that keep any GPU occupied for far longer than it takes to queue a multiplication."""


@dataclass(frozen=True)
class Case:
    """A product that is ready to run.

    Attributes
    ----------
    name : str
    x : Tensor
    run : callable
        Gives y from x as it then is; it may be called in any stream or thread.
    """

    name: str
    x: Tensor
    run: Callable[[], Tensor]


def checks(backend: Backend, device: torch.device, shown: Sequence[Example]) -> Iterator[Check]:
    """Run the checks of one backend on a CUDA device, one after the other."""
    for name, look in zip(NAMES, (side_stream, other_thread, graph, waiting, memory), strict=True):

        def run(findings: Findings, name: str = name, look: Callable[[Case, Findings], None] = look) -> str:
            if backend.name == "cupy" and name in NAMES[2:]:
                return "cupy takes memory from a pool of its own and may wait for it"
            count = 0
            for case in cases(backend, device, shown):
                case.run()  # compiles, loads and fills the pool of torch, which is not part of the checks
                torch.cuda.synchronize(device)
                look(case, findings)
                torch.cuda.synchronize(device)
                count += 1
            findings.cases = count
            return "" if count else f"it runs none of the layers on {device}"

        yield guarded(name, backend.name, None, run)


def cases(backend: Backend, device: torch.device, shown: Sequence[Example]) -> Iterator[Case]:
    """Prepare some layers of usual density in every dtype that the backend supports."""
    for one in shown:
        if one.density != 0.5 or one.in_features not in _IN_FEATURES:
            continue
        for dtype in ALLOWED:
            placement = Placement(device, dtype)
            if not all(backend.supports(packed, placement) for packed in one.members):
                continue
            dictionary, coefficients = prepared(backend, one, placement)
            for n_tokens in _TOKENS:
                x = one.inputs(n_tokens, placement)

                def run(x: Tensor = x, dictionary: Any = dictionary, coefficients: Any = coefficients) -> Tensor:
                    return backend.multiply(dictionary, coefficients, x, None)

                yield Case(f"{one.name}, {dtype}, {n_tokens} tokens".replace("torch.", ""), x, run)


def side_stream(case: Case, findings: Findings) -> None:
    """Write x late on another stream; work that is not queued behind it reads NaN."""
    expected, x = case.run(), case.x.clone()
    stream = torch.cuda.Stream(case.x.device)
    case.x.fill_(torch.nan)
    stream.wait_stream(torch.cuda.current_stream(case.x.device))
    with torch.cuda.stream(stream):
        occupy(case.x.device)
        case.x.copy_(x)
        found = case.run()
    torch.cuda.current_stream(case.x.device).wait_stream(stream)
    findings.require(same_bits(found, expected), f"{case.name}: other bits on a side stream")


def other_thread(case: Case, findings: Findings) -> None:
    """Run in a thread that has not touched the GPU yet."""
    expected, found, raised = case.run(), [], []
    torch.cuda.synchronize(case.x.device)

    def work() -> None:
        try:
            found.append(case.run())
        except RuntimeError as error:  # what ends a thread would only be printed
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    findings.require(same_bits(found[0], expected), f"{case.name}: other bits in another thread")


def graph(case: Case, findings: Findings) -> None:
    """Capture a product and replay it with other inputs."""
    x = case.x.clone()
    replay, found = captured(case)
    for factor in (1.0, -2.0):
        case.x.copy_(x * factor)
        expected = case.run()
        found.fill_(torch.nan)
        replay()
        findings.require(same_bits(found, expected), f"{case.name}: other bits from a CUDA graph")
    case.x.copy_(x)


def captured(case: Case) -> tuple[Callable[[], None], Tensor]:
    """Capture a product in a CUDA graph; gives how to replay it, and its output."""
    stream = torch.cuda.Stream(case.x.device)
    stream.wait_stream(torch.cuda.current_stream(case.x.device))
    with torch.cuda.stream(stream):  # torch asks for a run on a side stream before a capture
        case.run()
    torch.cuda.current_stream(case.x.device).wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        found = case.run()
    return recorded.replay, found


def waiting(case: Case, findings: Findings) -> None:
    """Queue a product behind much other work; the call must return before that work is done."""
    queued = torch.cuda.Event()
    occupy(case.x.device)
    queued.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    findings.require(not queued.query(), f"{case.name}: returned only when the work before it was done")


def memory(case: Case, findings: Findings) -> None:
    """Check that a product takes no memory of the GPU except from torch."""
    lost = []
    # Other programs on the GPU allocate memory too, so a loss counts only if it happens every time.
    for _ in range(3):
        before = _outside(case.x.device)
        for _ in range(4):
            case.run()
        torch.cuda.synchronize(case.x.device)
        lost.append(_outside(case.x.device) - before)
    findings.require(min(lost) <= 0, f"{case.name}: {min(lost)} bytes were not taken from torch")


def occupy(device: torch.device) -> None:
    """Queue work for a while on the current stream."""
    a = torch.zeros(_BUSY_SIZE, _BUSY_SIZE, device=device)
    b = torch.empty_like(a)
    for _ in range(_BUSY_PRODUCTS):
        torch.mm(a, a, out=b)


def _outside(device: torch.device) -> int:
    """Give the bytes of the GPU in use that torch's pool does not hold."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
