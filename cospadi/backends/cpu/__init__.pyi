from .runtime import dense_bf16
from .library import levels

__all__ = ["dense_bf16", "levels"]
