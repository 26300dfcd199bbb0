"""The product y = (x D) S at run time: kernels, the torch operator, ``SparseLinear``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
