"""Dense models from outside: opened, checked, their tensors by name, their linear layers and groups."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
