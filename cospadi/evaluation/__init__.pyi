from .activation_budget import windows_per_batch
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
    "generate",
    "load_model",
    "measure_folders",
    "perplexity",
    "read_questions",
    "windows_per_batch",
]
