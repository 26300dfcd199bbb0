"""The number of threads holds in the body alone, also in a process that has used no library before."""

import os
import subprocess
import sys

import pytest
import torch

from cospadi.executors.threads import limited_threads

FIRST = """
import sys, torch
from cospadi.executors.threads import limited_threads
n = int(sys.argv[1])
before = torch.get_num_threads()
with limited_threads(n):
    inside = torch.get_num_threads()
print(before, inside, torch.get_num_threads())
"""


@pytest.mark.parametrize("inside", [1, 2])
def test_the_first_use_in_a_process_leaves_the_number_as_it_was(inside):
    """numba sets the number of OpenMP to that of the cores when it is first asked for its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FIRST, str(inside)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", str(inside), "1"]


def test_an_error_and_nesting_bring_the_numbers_back():
    before = torch.get_num_threads()

    def body():
        with limited_threads(2):
            with limited_threads(1):
                assert torch.get_num_threads() == 1
            assert torch.get_num_threads() == 2
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert torch.get_num_threads() == before
