from .library import levels
from .runtime import dense_bf16

__all__ = ["dense_bf16", "levels"]
