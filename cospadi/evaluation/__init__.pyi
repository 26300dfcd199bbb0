from .activation_budget import batch_size
from .comparison import Protocol, compare
from .generation import generate
from .model_folders import load_model, measure_folders
from .multiple_choice import Question, read_questions

__all__ = [
    "Protocol",
    "Question",
    "batch_size",
    "compare",
    "generate",
    "load_model",
    "measure_folders",
    "read_questions",
]
