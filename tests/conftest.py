"""Settings of all tests."""

import os
import signal

from hypothesis import settings

# A shell starts what it runs in the background with Ctrl-C ignored, and children inherit that; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Searching at random finds faults on a developer's machine; in CI the same commit must give the same verdict.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
