from .crossover import Crossover, measure_crossovers, tuned_thresholds
from .layer_figures import LayerFigures, LayerRow, LayerSettings
from .model_figures import ModelFigures, ModelRow, ModelSettings
from .random_layers import LAYER_SHAPES
from .roofline import plot_layers, require_matplotlib
from .single_layers import measure_layers
from .whole_models import measure_model

__all__ = [
    "LAYER_SHAPES",
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
    "plot_layers",
    "require_matplotlib",
    "tuned_thresholds",
]
