"""Checks of the backends on the machine at hand: what the tests of the package cannot run without its GPU."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
