"""Training-free compression of language models by sparse dictionary learning.

The public names, loaded when they are first used; ``import cospadi`` also teaches transformers to read our checkpoints.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

from cospadi.integrations.autoload import install_hook
from cospadi.integrations.moved import install_moved_modules

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

try:
    __version__ = version("cospadi")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

install_hook()
install_moved_modules()
