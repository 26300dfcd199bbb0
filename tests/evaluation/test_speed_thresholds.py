"""Thresholds between kernels and dense products, found on a clock of the tests' own."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.cpu import runtime as cpu_backend
from cospadi.errors import UnavailableError
from cospadi.evaluation.speed import crossover
from cospadi.evaluation.speed.random_layers import layer_size, random_layer

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ({1: 3.0, 2: 2.0, 8: 1.1, 16: 0.9, 32: 0.5}, 8),
        ({1: 0.9, 2: 0.5}, 0),
        ({1: 2.0, 2: 2.0}, 2),
        ({1: 3.0, 2: 0.97, 4: 1.5, 8: 0.8, 16: 0.7}, 4),  # noise at one number of tokens
        ({1: 1.0}, 0),
        ({16: 0.5, 1: 3.0, 4: 1.2}, 4),
        ({}, 0),
    ],
)
def test_the_threshold_minimises_the_time(advantage, expected):
    assert crossover.threshold(advantage) == expected


@given(st.dictionaries(st.integers(1, 512), st.floats(0.1, 10), max_size=8))
def test_no_other_threshold_would_take_less_time(advantage):
    def cost(limit):
        return -sum(math.log(factor) for n_tokens, factor in advantage.items() if n_tokens <= limit)

    best = cost(crossover.threshold(advantage))
    assert all(best <= cost(limit) + 1e-9 for limit in (0, *advantage))


def test_crossovers_are_found_and_stored_for_auto(cache, world, small, monkeypatch):
    """A kernel that takes 1 second per token, a dense product that takes a limit of its dtype, find that limit."""
    state = BACKENDS.availability("cpu")
    if not state:
        pytest.skip(state.reason)
    from cospadi.backends import tuning
    from cospadi.backends.auto import AutoBackend

    limits = {BF16: 30.0, F32: 3.5, torch.float16: 2000.0}
    seen = []

    def multiply(backend, dictionary, coefficients, x, member):
        kernel = x.shape[0] <= backend.max_tokens
        seen.append((x.dtype, x.shape[0]))
        world.work(x.shape[0] if kernel else limits[x.dtype])
        return x

    monkeypatch.setattr(cpu_backend.CpuBackend, "multiply", multiply)
    told = []
    found = crossover.measure_crossovers(CPU, 1e9, told.append, world.clock, now=lambda: 0.0)
    assert {one.dtype: one.value for one in found} == {"bfloat16": 24, "float32": 2, "float16": 1024}
    assert all(one.option == "max_tokens" and one.backend == "cpu" for one in found)
    bf16 = found[0].advantage
    assert bf16[1] == pytest.approx(30.0)
    assert bf16[48] == pytest.approx(30 / 48)
    # Three clear losses in a row settle it (48, 64 and 96): what is larger was not tried.
    assert max(bf16) == 96
    assert max(n for dtype, n in seen if dtype == F32) < 32
    assert len(told) == 3
    tuning.store_tuned(crossover.tuned_thresholds(CPU, found))
    for dtype, most in ((BF16, 24), (F32, 2), (torch.float16, 1024)):
        assert AutoBackend().resolve(Placement(CPU, dtype)) == cpu_backend.CpuBackend(max_tokens=most)


def test_measuring_ends_when_its_time_is_over(world, small, monkeypatch):
    state = BACKENDS.availability("cpu")
    if not state:
        pytest.skip(state.reason)

    def multiply(backend, dictionary, coefficients, x, member):
        world.work(1.0 if x.shape[0] <= backend.max_tokens else 2.0)
        return x

    monkeypatch.setattr(cpu_backend.CpuBackend, "multiply", multiply)
    found = crossover.measure_crossovers(CPU, 60.0, clock=world.clock, now=lambda: world.now)
    # A kernel that always wins: no threshold was found, and none is stored.
    assert len(found) == 3
    for one in found:
        assert one.value is None
        assert max(one.advantage) < 1024
    assert set(found[-1].advantage) >= {1}
    assert crossover.tuned_thresholds(CPU, found) == []


def test_the_two_thresholds_of_a_gpu_are_measured_one_after_the_other(world, small, monkeypatch):
    """On a CPU, with a backend that stands for the GPU's."""
    made = []

    @dataclass(frozen=True)
    class Fake:
        options: tuple

        def prepare_dictionary(self, *_):
            return None

        def prepare_coefficients(self, *_):
            return None

        def multiply(self, dictionary, coefficients, x, member):
            options = dict(self.options)
            world.work(4.0 if x.shape[0] <= options["project_tokens"] else 5.0 if x.shape[0] <= 16 else 3.0)
            world.work(1.0 if x.shape[0] <= options["combine_tokens"] and x.shape[0] <= 64 else 2.0)
            return x

    def create(name, options):
        made.append(options)
        return Fake(tuple(options.items()))

    layers = [random_layer(layer_size((64, 48), 0.3), BF16, CPU)]
    monkeypatch.setattr(crossover, "BACKENDS", type("Registry", (), {"create": staticmethod(create)}))
    known = {}
    for option in ("project_tokens", "combine_tokens"):
        ways = crossover.ways_of(option, ("project_tokens", "combine_tokens"), known)
        advantage = crossover._advantages(layers, ways, Placement(CPU, BF16), world.clock, lambda: True)
        known[option] = crossover.threshold(advantage)
    assert known["project_tokens"] == 16
    assert known["combine_tokens"] == 64
    assert made[0]["combine_tokens"] == made[1]["combine_tokens"] > 10**6
    assert made[2]["project_tokens"] == made[3]["project_tokens"] == 16


def test_devices_without_thresholds_are_refused():
    with pytest.raises(UnavailableError, match="give cpu or cuda"):
        crossover.measure_crossovers(torch.device("meta"))
