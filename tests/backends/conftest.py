"""A small group of layers, and a count of its products."""

import pytest
import torch

from cospadi.backends.bundle import Bundle
from tests.backends.backend_cases import Block, Case


@pytest.fixture(autouse=True)
def one_thread():
    """Run small layers on one thread: threads that wait for each other cost more than the products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def case():
    return Case(6, n_atoms=19, in_features=11, widths=(7, 5, 9))


@pytest.fixture
def block(case):
    return Block(case)


@pytest.fixture
def runs(monkeypatch):
    """Count the products: the members that were asked for, -1 for all."""
    calls = []
    run = Bundle._run

    def counted(self, x, tensors, member):
        calls.append(member)
        return run(self, x, tensors, member)

    monkeypatch.setattr(Bundle, "_run", counted)
    return calls


@pytest.fixture
def fresh_compiler():
    """Let no compiled graph of another test be taken."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
