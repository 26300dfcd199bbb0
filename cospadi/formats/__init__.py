"""How factorisations are stored: bits and tensors, the checkpoint folder and its checked reader (docs/format.md)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
