"""Register our quantizer with transformers when transformers loads its own, without importing it ourselves.

``import cospadi`` must be enough for ``AutoModelForCausalLM.from_pretrained`` to read our checkpoints, and must stay
quick for those who never touch transformers.  transformers offers no entry points, so a finder at the front of
``sys.meta_path`` waits for the one module that holds the table of quantizers, lets the ordinary finders load it,
imports our integration right after it, and removes itself.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLE = "transformers.quantizers.auto"
_INTEGRATION = "cospadi.integrations.transformers"


class _Registering(Loader):
    """The ordinary loader of a module, followed by the import of our integration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module gets its own loader back, so that nothing of ours is visible in it.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        importlib.import_module(_INTEGRATION)


class _Waiting(MetaPathFinder):
    """Finds the table of quantizers once, through the other finders."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def install_hook() -> None:
    """Register now if transformers has loaded its quantizers, else when it does; calling it again changes nothing."""
    if _TABLE in sys.modules:
        importlib.import_module(_INTEGRATION)
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())
