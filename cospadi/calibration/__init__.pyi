from .activations import ActivationCache
from .collectors import Collector, GramCollector
from .cross_gram import CrossGram
from .data import EMBEDDED_EVALUATION, fingerprint, open_text, token_windows
from .gram import Gram
from .lockstep import Lockstep, WalkedModel, forward_call
from .sensitivity import LossGradients, largest_batch, walk_statistics
from .sequential import SequentialWalk
from .source_statistics import SourceStatistics

__all__ = [
    "EMBEDDED_EVALUATION",
    "ActivationCache",
    "Collector",
    "CrossGram",
    "Gram",
    "GramCollector",
    "Lockstep",
    "LossGradients",
    "SequentialWalk",
    "SourceStatistics",
    "WalkedModel",
    "fingerprint",
    "forward_call",
    "largest_batch",
    "open_text",
    "token_windows",
    "walk_statistics",
]
