"""Dictionary solvers: one whitened target in, a dictionary and sparse coefficients out."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
