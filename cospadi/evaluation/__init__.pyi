from .activation_budget import batch_size
from .comparison import Comparison, Measurement, Protocol
from .generation import generate
from .likelihood import Perplexity, perplexity
from .model_folders import load_model, measure_folders
from .multiple_choice import ChoicesResult, Question, read_questions

__all__ = [
    "ChoicesResult",
    "Comparison",
    "Measurement",
    "Perplexity",
    "Protocol",
    "Question",
    "batch_size",
    "generate",
    "load_model",
    "measure_folders",
    "perplexity",
    "read_questions",
]
