"""Files that are whole or not there, locks, and names and JSON that cannot be trusted."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
