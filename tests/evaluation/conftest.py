"""A clock of the tests' own, and small layers, for the tests that measure speed."""

import pytest

from cospadi.backends import BACKENDS, cpu
from cospadi.evaluation.speed import contenders, crossover, single_layers


class World:
    """Time that passes only when work says so."""

    def __init__(self):
        self.now = 0.0

    def work(self, seconds):
        self.now += seconds

    def clock(self, work):
        before = self.now
        work()
        return self.now - before


@pytest.fixture
def world():
    return World()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    BACKENDS.availability("cpu")  # compiles its kernels, once, in the cache that all tests share
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def small(monkeypatch):
    """Two copies of every layer, a small layer for thresholds, and no time spent on the machine's rates."""
    monkeypatch.setattr(contenders, "n_copies", lambda *_: 2)
    monkeypatch.setattr(crossover, "n_copies", lambda *_: 2)
    monkeypatch.setattr(crossover, "_SHAPES", {"cpu": ((64, 48),)})
    monkeypatch.setattr(single_layers, "bandwidth", lambda device: 2e9)
    monkeypatch.setattr(single_layers, "product_rate", lambda device, dtype: 4e9)
    monkeypatch.setattr(single_layers, "cache_bytes", lambda device: 1 << 20)


class Priced:
    """Makes every product of a kind take a price, on a clock of the tests' own."""

    def __init__(self, world, monkeypatch):
        self.world = world
        self.prices = {}
        linear = contenders._linear
        monkeypatch.setattr(contenders, "_linear", self.wrap(contenders.DENSE, linear))
        monkeypatch.setattr(cpu, "dense_bf16", self.wrap(contenders.HANDWRITTEN, linear))
        for name in ("cpu", "reference", "torch"):
            kind = BACKENDS.get(name)
            monkeypatch.setattr(kind, "multiply", self.method(name, kind.multiply))

    def wrap(self, name, product):
        def priced(*args):
            self.world.work(self.prices.get(name, 1.0))
            return product(*args)

        return priced

    def method(self, name, product):
        def priced(backend, *args):
            self.world.work(self.prices.get(name, 1.0))
            return product(backend, *args)

        return priced


@pytest.fixture
def priced(world, monkeypatch):
    return Priced(world, monkeypatch)
