from .compressed_model import decompress, load, require_checkpoint
from .transformers import CospadiConfig, CospadiQuantizer

__all__ = ["CospadiConfig", "CospadiQuantizer", "decompress", "load", "require_checkpoint"]
