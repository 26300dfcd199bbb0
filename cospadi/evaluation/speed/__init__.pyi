from .crossover import Crossover, measure_crossovers, to_store
from .layer_figures import LayerFigures, LayerRow, LayerSettings
from .random_layers import SHAPES
from .roofline import plot, require_matplotlib
from .single_layers import measure_layers
from .whole_models import ModelFigures, ModelRow, ModelSettings, measure_model

__all__ = [
    "SHAPES",
    "Crossover",
    "LayerFigures",
    "LayerRow",
    "LayerSettings",
    "ModelFigures",
    "ModelRow",
    "ModelSettings",
    "measure_crossovers",
    "measure_layers",
    "measure_model",
    "plot",
    "require_matplotlib",
    "to_store",
]
