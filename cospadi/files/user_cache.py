"""Where cospadi keeps what it may make again: converted models, compiled kernels, tuned thresholds."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Give where converted models are kept: ``$COSPADI_CACHE``, else ``cospadi`` in the user's cache folder."""
    named = os.environ.get("COSPADI_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cospadi"
