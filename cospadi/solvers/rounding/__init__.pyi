from .dense import quantize_dense
from .factors import round_factors
from .gptq import RoundedRows

__all__ = ["RoundedRows", "quantize_dense", "round_factors"]
