"""The self-test finds what is wrong: it is run on backends with one fault each."""

import contextlib
import threading
import types
from itertools import count

import pytest
import torch

from cospadi.backends.base import BACKENDS, Backend, Placement
from cospadi.backends.selftest import gpu
from cospadi.backends.selftest import run_checks as selftest
from cospadi.backends.selftest.examples import example
from cospadi.backends.selftest.findings import guarded
from cospadi.backends.selftest.learners import ksvd
from cospadi.backends.selftest.products import products
from cospadi.errors import UnavailableError
from cospadi.registry import Availability

CPU = torch.device("cpu")
PLACE = Placement(CPU, torch.float32)
SHAPE = (130, 40, (23, 5))


class Wrapped(Backend):
    """The reference, with something done to its inputs and output."""

    name = "wrapped"

    def __init__(self, fault=lambda y, x, member: y, supported=True):
        self.inner, self.fault, self.supported = BACKENDS.create("reference"), fault, supported

    def supports(self, packed, placement):
        return Availability(self.supported, "" if self.supported else "only on Sundays")

    def prepare_dictionary(self, dictionary, placement):
        return self.inner.prepare_dictionary(dictionary, placement)

    def prepare_coefficients(self, members, placement):
        return self.inner.prepare_coefficients(members, placement)

    def multiply(self, dictionary, coefficients, x, member):
        return self.fault(self.inner.multiply(dictionary, coefficients, x, member), x, member)


def one_column_off(y, x, member):
    y[:, -1:] *= 1.2
    return y


def spoils_the_input(y, x, member):
    x[:1] += 1
    return y


def one_layer_for_another(y, x, member):
    return y[:, :5] if member == 0 else y


def in_another_order(y, x, member):
    return y if member is None or len(y) < 2 else torch.stack([y[1], y[0], *y[2:]])


def transposed(y, x, member):
    return y.T.contiguous().T if min(y.shape) > 1 else y


def drifting():
    """Another last bit with every call."""
    calls = count()
    return lambda y, x, member: torch.nextafter(y, y + 1) if next(calls) % 2 else y


@pytest.fixture(scope="module")
def shown():
    return [example(SHAPE, density, value_dtype, CPU) for density in (0.0, 0.5) for value_dtype in ("bfloat16", "int8")]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (one_column_off, "relative error"),
        (spoils_the_input, "the input was changed"),
        (one_layer_for_another, "layer 0: shape"),
        (in_another_order, "layer 0: relative error"),
        (transposed, "not contiguous"),
        (drifting(), "other bits the second time"),
        (lambda y, x, member: y.double(), "float64"),
        (lambda y, x, member: y.no_such_method(), "AttributeError"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_of_a_product_fails_the_check(shown, fault, words):
    found = products(Wrapped(fault), PLACE, shown, (0, 1, 8))
    assert found.verdict == "failed"
    assert words in found.detail


def test_a_right_backend_passes_with_its_cases_counted(shown):
    found = products(Wrapped(), PLACE, shown, (0, 1, 8))
    assert (found.verdict, found.cases, found.detail) == ("passed", 4 * 3 * 3, "")
    assert 0 < found.worst < found.allowed


def test_checks_that_look_at_nothing_or_find_infinite_errors_do_not_pass(shown):
    assert guarded("check", "nobody", None, lambda findings: "").verdict == "skipped"
    found = products(Wrapped(supported=False), PLACE, shown, (1,))
    assert (found.verdict, found.cases, found.worst, found.detail) == ("skipped", 0, None, "only on Sundays")
    found = products(Wrapped(lambda y, x, member: y / 0), PLACE, shown, (1,))
    assert (found.verdict, found.worst) == ("failed", None), "JSON has no infinite numbers"


def test_ksvd_on_torch_arrays_agrees_and_a_wrong_one_fails(monkeypatch):
    assert ksvd("ksvd-torch", CPU).verdict == "passed"
    from cospadi.solvers import ksvd as module

    right = module.update_atoms_arrays

    def wrong(A, S, residual, steps):
        A, S, residual = right(A, S, residual, steps)
        return A, S * 1.01, residual

    monkeypatch.setattr(module, "update_atoms_arrays", wrong)
    assert ksvd("ksvd-torch", CPU).verdict == "failed"


def test_without_a_gpu_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(selftest, "cuda_availability", lambda: Availability(False, "torch finds no CUDA GPU"))
    for start in (selftest.machine, lambda gpu: next(selftest.checks(gpu))):
        with pytest.raises(UnavailableError, match=r"torch finds no CUDA GPU.*without --gpu"):
            start(True)


class PretendedCuda:
    """The part of torch.cuda that the checks use; what is queued is done at once, on the CPU."""

    def __init__(self, monkeypatch):
        self.modes, self.finished, self.outside = [], False, 0
        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        replaced = {
            "synchronize": lambda device: None,
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
            "graph": lambda graph: contextlib.nullcontext(),
            "Event": lambda: types.SimpleNamespace(record=lambda: None, query=lambda: self.finished),
            "set_sync_debug_mode": self.modes.append,
            "mem_get_info": lambda device: (10_000 - self.outside, 20_000),
            "memory_reserved": lambda device: 4_000,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(gpu, "occupy", lambda device: None)
        monkeypatch.setattr(gpu, "_TOKENS", (1, 5))

        def captured(case):
            found = case.run()
            return lambda: found.copy_(case.run()), found

        self.captured = gpu.captured
        monkeypatch.setattr(gpu, "captured", captured)


@pytest.fixture
def cuda(monkeypatch):
    return PretendedCuda(monkeypatch)


class Doubling(Wrapped):
    """No product, but the same bits in every thread of a CPU, which its libraries do not promise for products."""

    def multiply(self, dictionary, coefficients, x, member):
        return self.fault(2 * x, x, member)


def verdicts(fault=lambda y, x, member: y, name="doubling"):
    backend = Doubling(fault)
    backend.name = name
    shown = [example(SHAPE, 0.5, "bfloat16", CPU), example(SHAPE, 0.1, "bfloat16", CPU)]
    return {found.check: found for found in gpu.checks(backend, CPU, shown)}


def failures(found):
    return {check: one.detail for check, one in found.items() if one.verdict == "failed"}


def test_a_right_backend_passes_every_check_of_the_gpu(cuda):
    found = verdicts()
    assert tuple(found) == gpu.NAMES
    assert failures(found) == {}
    assert {(one.verdict, one.cases, one.detail) for one in found.values()} == {("passed", 6, "")}
    assert cuda.modes == ["error", "default"] * 6  # the setting is put back, or the rest of the program would suffer


def test_cupy_is_not_said_to_pass_what_it_does_not_promise(cuda):
    found = verdicts(name="cupy")
    assert failures(found) == {}
    assert [one.verdict for one in found.values()] == ["passed", "passed", "skipped", "skipped", "skipped"]
    assert all(one.detail for one in found.values() if one.verdict == "skipped")


def test_changing_bits_fail_streams_threads_and_graphs(cuda):
    calls = count()

    def drift(y, x, member):
        return y + next(calls)

    found = failures(verdicts(drift))
    assert tuple(found) == gpu.NAMES[:3]
    assert all("other bits" in detail for detail in found.values())


def test_a_graph_that_does_not_read_its_input_again_fails(cuda, monkeypatch):
    monkeypatch.setattr(gpu, "captured", cuda.captured)  # with a replay that does nothing
    assert tuple(failures(verdicts())) == ("CUDA graph",)


def test_a_backend_that_fails_in_other_threads_fails(cuda):
    def only_here(y, x, member):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("invalid device context")
        return y

    assert failures(verdicts(only_here)) == {"other thread": "RuntimeError: invalid device context"}


def test_waiting_fails(cuda):
    cuda.finished = True
    assert tuple(failures(verdicts())) == ("waits for nothing",)
    cuda.finished = False

    def synchronises(y, x, member):
        if cuda.modes and cuda.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return y

    assert "synchronizing" in failures(verdicts(synchronises))["waits for nothing"]
    assert cuda.modes[-1] == "default"


def test_memory_from_elsewhere_fails_when_it_is_lost_every_time(cuda):
    def takes(y, x, member):
        cuda.outside += 512
        return y

    assert "2048 bytes" in failures(verdicts(takes))["memory from torch only"]
    once = iter([1000])

    def takes_once(y, x, member):
        cuda.outside += next(once, 0)
        return y

    assert failures(verdicts(takes_once)) == {}


def test_a_backend_that_runs_nothing_there_is_skipped(cuda):
    found = list(gpu.checks(Wrapped(supported=False), CPU, [example(SHAPE, 0.5, "bfloat16", CPU)]))
    assert {(one.verdict, one.detail) for one in found} == {("skipped", "it runs none of the layers on cpu")}
