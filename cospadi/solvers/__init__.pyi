from .auto import Auto
from .base import SOLVERS, Problem, Solution, Solver, Status, relative_error
from .coders import BatchOMP, Coder, GeneralizedOMP
from .htp import HTP, START_ALTERNATIONS
from .metric_pursuit import pursue_in_metric
from .one_dictionary import SharedHTP
from .shared_problem import SharedProblem
from .sparse_weight import sparsify
from .updates import hard_threshold, leading_left_singular_vectors, least_squares_dictionary

__all__ = [
    "HTP",
    "SOLVERS",
    "START_ALTERNATIONS",
    "Auto",
    "BatchOMP",
    "Coder",
    "GeneralizedOMP",
    "Problem",
    "SharedHTP",
    "SharedProblem",
    "Solution",
    "Solver",
    "Status",
    "hard_threshold",
    "leading_left_singular_vectors",
    "least_squares_dictionary",
    "pursue_in_metric",
    "relative_error",
    "sparsify",
]
