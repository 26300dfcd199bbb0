"""From the Gram of the inputs to the whitened problem and back, and the errors that it measures."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
