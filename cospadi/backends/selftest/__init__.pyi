from .findings import Check
from .run_checks import checks, machine

__all__ = ["Check", "checks", "machine"]
