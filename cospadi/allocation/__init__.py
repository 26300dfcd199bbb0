"""What each group of layers may become, at which cost, and the choice within the budget."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
