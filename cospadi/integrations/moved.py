"""Import paths that documents named before the modules moved into rooms.

Each keeps working until the next release and warns where it is imported.
"""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "cospadi.config": "cospadi.recipe",
    "cospadi.embedded": "cospadi.models",
    "cospadi.execution": "cospadi.recipe",
    "cospadi.factorization": "cospadi.formats",
    "cospadi.layers": "cospadi.models",
    "cospadi.loading": "cospadi.integrations",
    "cospadi.modules": "cospadi.backends",
    "cospadi.progress": "cospadi.pipeline",
}
"""Old module to the room that has its names now."""


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules of ``MOVED``: each is empty and takes its names from the room."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Give the spec of a moved module, or None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and have the module ask the room for its names."""
        room = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} has moved: import from {room}; the old path ends with the next release",
            DeprecationWarning,
            stacklevel=2,  # warnings skips the frames of the import system
        )
        vars(module)["__getattr__"] = lambda name: getattr(importlib.import_module(room), name)


def install_moved_modules() -> None:
    """Let Python find the old paths, after it has looked everywhere else."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
