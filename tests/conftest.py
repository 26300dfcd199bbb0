"""Settings of all tests."""

import os

from hypothesis import settings

# Searching at random finds faults on a developer's machine; in CI the same commit must give the same verdict.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")
