"""Checks of the backends on this machine, for instance on a GPU that the tests of the package do not have."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
