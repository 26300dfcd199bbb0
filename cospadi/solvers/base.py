"""The contract of a dictionary solver.

A solver sees one whitened problem, never a model: find a dictionary A and coefficients S, with at most ``n_nonzero``
non-zeros in each column of S, so that

    sum_j f_j ||y_j - A s_j||^2

is small, where the y_j are the columns of the target ``Y = L^T W`` and ``f`` optional column weights.  The squared
whitened error is the error of the layer's outputs on the calibration data (arXiv 2509.22075).  Some solvers also take a
full metric M on the columns and minimise ``tr((Y - A S) M (Y - A S)^T)``.
"""

import abc
import enum
from dataclasses import dataclass, field
from typing import ClassVar, final

import numpy as np

from cospadi.arrays import Array, convert, library_of, namespace, on_cpu
from cospadi.errors import NumericalError, UsageError
from cospadi.registry import Availability, Registry
from cospadi.whitening import Problem as Problem


class Status(enum.Enum):
    """How a solve ended; the value is the text for reports."""

    CONVERGED = "converged: the relative improvement fell below the tolerance"
    MAX_ITERATIONS = "used all its iterations; more may still lower the error"
    CLOSED_FORM = "closed form: nothing to iterate"


@dataclass(frozen=True)
class Solution:
    """A factorisation of the target, with how it was reached.

    Attributes
    ----------
    dictionary : array, shape (in_features, n_atoms)
        The whitened dictionary A, in the array library, device and dtype of the problem's target.
    coefficients : array, shape (n_atoms, n_columns)
        S, with zeros outside the support.
    status : Status
        Why the solver stopped.
    statistics : dict
        Plain numbers and texts: ``iterations``, and what had to be repaired (``replaced_atoms``,
        ``dependent_columns``: columns whose pursuit ended early); keys whose value is 0 may be left out.
    """

    dictionary: Array
    coefficients: Array
    status: Status = Status.CLOSED_FORM
    statistics: dict[str, float | int | str] = field(default_factory=dict)


class Solver(abc.ABC):
    """Base of all dictionary solvers: frozen dataclasses whose fields are their options.

    A subclass implements ``_factorize`` for unweighted, finite targets in its ``library``.  Laws that hold for each of
    them, and that the tests check: S has at most n_nonzero non-zeros per column; the problem is not modified; the same
    problem gives the same bytes; scaling the target scales the product; permuting the columns permutes the
    coefficients.
    """

    library: ClassVar[str | None] = None
    """Array library that it computes with; None means numpy for arrays on the CPU and else the target's own."""
    sparse: ClassVar[bool] = True
    """Whether the coefficients are sparse; False asks for n_nonzero == n_atoms and the ``dense`` format."""
    takes_column_metric: ClassVar[bool] = False
    """Whether problems may have a ``column_metric``; then the subclass implements ``_factorize_in_metric``."""

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether the solver can run on this machine."""
        return Availability(True)

    @abc.abstractmethod
    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        """Factorise an unweighted target that is in the solver's array library; must not modify it."""

    def _factorize_in_metric(self, target: Array, metric: Array, n_atoms: int, n_nonzero: int) -> Solution:
        """Factorise a target whose columns are scaled so that the metric has a unit diagonal."""
        raise UsageError(f"{type(self).__name__} takes no column metric: use htp, or column_weights")

    @final
    def solve(self, problem: Problem) -> Solution:
        """Solve one problem.

        Parameters
        ----------
        problem : Problem
            The whitened target and the sizes.

        Returns
        -------
        Solution
            Arrays of the same library, device and dtype as ``problem.target``.

        Raises
        ------
        NumericalError
            The target, the weights or the result hold NaN or infinity.
        UsageError
            The solver cannot handle these sizes.
        """
        given = library_of(problem.target)
        library = self.library or ("numpy" if given == "torch" and on_cpu(problem.target) else given)
        if not self.sparse and problem.n_nonzero != problem.n_atoms:
            raise UsageError(f"{type(self).__name__} has dense coefficients: n_nonzero must equal n_atoms")
        target = convert(problem.target, library)
        xp = namespace(target)
        weights = None
        if problem.column_weights is not None:
            weights = xp.astype(convert(problem.column_weights, library), target.dtype)
            if not bool(xp.all(xp.isfinite(weights))) or bool(xp.any(weights < 0)):
                raise NumericalError("the column weights must be finite and not negative")
            # A floor keeps columns that the loss ignores solvable: the scale is divided out of S afterwards.
            floor = max(float(xp.max(weights)) * 1e-12, float(np.finfo(np.float32).tiny))
            weights = xp.sqrt(xp.clip(weights, floor, None))
            target = target * weights[None, :]
        metric = None
        if problem.column_metric is not None:
            metric = xp.astype(convert(problem.column_metric, library), target.dtype)
            weights = xp.sqrt(xp.linalg.diagonal(metric))
            if not bool(xp.all(xp.isfinite(metric))):
                raise NumericalError("the column metric holds NaN or infinity")
            largest = float(xp.max(weights))
            # Columns that the metric ignores keep a small weight of their own, as above.
            weights = xp.clip(weights, largest * 1e-6 if largest > 0 else 1.0, None)
            metric = metric / (weights[:, None] * weights[None, :])
            target = target * weights[None, :]
        # LAPACK's decomposition of what overflows when squared may never end.
        if not bool(xp.isfinite(xp.sum(target * target))):
            raise NumericalError("the target holds NaN or infinity, or overflows when squared")
        if metric is not None:
            solution = self._factorize_in_metric(target, metric, problem.n_atoms, problem.n_nonzero)
        else:
            solution = self._factorize(target, problem.n_atoms, problem.n_nonzero, problem.seed)
        coefficients = solution.coefficients
        if weights is not None:
            coefficients = coefficients / weights[None, :]
        if not bool(xp.all(xp.isfinite(coefficients))) or not bool(xp.all(xp.isfinite(solution.dictionary))):
            raise NumericalError(f"{type(self).__name__} produced NaN or infinity")
        return Solution(
            _give_back(solution.dictionary, problem.target),
            _give_back(coefficients, problem.target),
            solution.status,
            solution.statistics,
        )


def relative_error(target: Array, solution: Solution) -> float:
    """Give ||Y - A S||_F / ||Y||_F (0 for a zero target): the relative functional error of the layer."""
    xp = namespace(target)
    total = float(xp.sum(target * target))
    residual = target - solution.dictionary @ solution.coefficients
    return (float(xp.sum(residual * residual)) / total) ** 0.5 if total > 0 else 0.0


def _give_back(array: Array, like: Array) -> Array:
    """Convert to the library, device and dtype of another array."""
    converted = convert(array, library_of(like)) if library_of(like) != library_of(array) else array
    if library_of(like) == "torch":
        return converted.to(device=like.device, dtype=like.dtype)
    return namespace(converted).astype(converted, like.dtype, copy=False)


SOLVERS: Registry[Solver] = Registry("cospadi.solvers", "solver")
