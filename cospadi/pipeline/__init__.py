"""The stages joined: from a dense model to a checkpoint folder, with records that survive interruptions."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
