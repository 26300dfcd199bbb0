"""The kernels in C are there wherever a compiler is: the other tests of them skip without one."""

import shutil

import pytest

from cospadi.backends import BACKENDS


@pytest.mark.skipif(shutil.which("cc") is None, reason="this machine has no C compiler")
def test_the_kernels_compile_where_there_is_a_compiler():
    state = BACKENDS.availability("cpu")
    assert state, state.reason
