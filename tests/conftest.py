"""Settings of all tests."""

import os
import signal

# Workers of pytest-xdist share the cores; set before torch, numpy and numba start their threads.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _workers > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))

from hypothesis import settings  # noqa: E402

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Searching at random finds faults on a developer's machine; in CI the same commit must give the same verdict.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
