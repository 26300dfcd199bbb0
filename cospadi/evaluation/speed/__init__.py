"""Measuring speed: single layers, whole models, and the thresholds between kernels."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
