"""How many threads the numerical libraries of this process use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def available_threads() -> int:
    """Give the number of threads that torch would use now; it heeds the processor, its affinity and OMP_NUM_THREADS."""
    return torch.get_num_threads()


@contextmanager
def limited_threads(n: int) -> Iterator[None]:
    """Let torch, BLAS, OpenMP and numba use exactly ``n`` threads in the body, and put their numbers back.

    numba never has more than there are cores; cospadi's kernels give the same bytes with any number.
    """
    # A limit reaches only the libraries that are loaded: load all those that a task may use.
    import numba
    import scipy.linalg  # noqa: F401
    from threadpoolctl import threadpool_limits

    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    before, before_numba = torch.get_num_threads(), numba.get_num_threads()
    try:
        with threadpool_limits(n):
            torch.set_num_threads(n)
            numba.set_num_threads(min(n, most))
            yield
    finally:
        numba.set_num_threads(before_numba)
        # Last: numba's first call sets the number of OpenMP, and so torch's, which threadpool_limits then brings back.
        torch.set_num_threads(before)
