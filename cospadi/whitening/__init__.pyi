from .objective import Objective, build_objective
from .problem import Problem
from .square_root import Whitening, output_errors, whitening_from_gram

__all__ = ["Objective", "Problem", "Whitening", "build_objective", "output_errors", "whitening_from_gram"]
