from .dense import quantize_dense
from .factors import round_factors

__all__ = ["quantize_dense", "round_factors"]
