from .crossover import Crossover, measure_crossovers, to_store
from .problems import SHAPES
from .roofline import plot, require_matplotlib
from .single_layers import LayerSettings, measure_kernels
from .whole_models import ModelSettings, measure_model

__all__ = [
    "SHAPES",
    "Crossover",
    "LayerSettings",
    "ModelSettings",
    "measure_crossovers",
    "measure_kernels",
    "measure_model",
    "plot",
    "require_matplotlib",
    "to_store",
]
