"""Training-free compression of language models by sparse dictionary learning.

The public names, loaded when they are first used; ``import cospadi`` also teaches transformers to read our checkpoints.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from cospadi.integrations.autoload import install_hook

if TYPE_CHECKING:
    from cospadi.backends.base import BACKENDS, Backend
    from cospadi.errors import CospadiError, UsageError
    from cospadi.formats.base import FORMATS, Format
    from cospadi.integrations.compressed_model import decompress, load
    from cospadi.models.embedded import embedded_model
    from cospadi.pipeline.stages import collect_grams, compress
    from cospadi.recipe.options import CalibrationConfig, CompressionConfig
    from cospadi.solvers.base import SOLVERS, Problem, Solution, Solver

_PUBLIC = {
    "BACKENDS": "backends.base",
    "Backend": "backends.base",
    "CalibrationConfig": "recipe.options",
    "CompressionConfig": "recipe.options",
    "CospadiError": "errors",
    "FORMATS": "formats.base",
    "Format": "formats.base",
    "Problem": "solvers.base",
    "SOLVERS": "solvers.base",
    "Solution": "solvers.base",
    "Solver": "solvers.base",
    "UsageError": "errors",
    "collect_grams": "pipeline.stages",
    "compress": "pipeline.stages",
    "decompress": "integrations.compressed_model",
    "embedded_model": "models.embedded",
    "load": "integrations.compressed_model",
}

__all__ = [
    "BACKENDS",
    "FORMATS",
    "SOLVERS",
    "Backend",
    "CalibrationConfig",
    "CompressionConfig",
    "CospadiError",
    "Format",
    "Problem",
    "Solution",
    "Solver",
    "UsageError",
    "collect_grams",
    "compress",
    "decompress",
    "embedded_model",
    "load",
]

try:
    __version__ = version("cospadi")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"cospadi.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'cospadi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])


install_hook()
