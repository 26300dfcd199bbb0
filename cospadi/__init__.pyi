from .backends import BACKENDS, Backend
from .errors import CospadiError, UsageError
from .formats import FORMATS, Format
from .integrations import decompress, load
from .models import embedded_model
from .pipeline import collect_grams, compress
from .recipe import CalibrationConfig, CompressionConfig
from .solvers import SOLVERS, Problem, Solution, Solver

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
__version__: str
