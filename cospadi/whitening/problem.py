"""The whitened problem that a dictionary solver is given."""

from dataclasses import dataclass

from cospadi.arrays import Array
from cospadi.errors import UsageError


@dataclass(frozen=True)
class Problem:
    """One dictionary-learning problem.

    Attributes
    ----------
    target : array, shape (in_features, n_columns), floating
        The whitened weight Y.  Never modified.
    n_atoms : int
        Columns of the dictionary; may exceed ``in_features``.
    n_nonzero : int
        Largest number of non-zeros in a column of S, between 0 and ``n_atoms``.
    column_weights : array, shape (n_columns,), floating, optional
        Non-negative weights f of the columns' squared errors.
    column_metric : array, shape (n_columns, n_columns), floating, optional
        Symmetric positive semidefinite M in place of weights, for solvers that have ``takes_column_metric``.
    seed : int
        Seed of whatever is random in the solver.
    """

    target: Array
    n_atoms: int
    n_nonzero: int
    column_weights: Array | None = None
    column_metric: Array | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shape = tuple(self.target.shape)
        if len(shape) != 2 or 0 in shape:
            raise UsageError(f"the target must be a non-empty matrix, got shape {shape}")
        if self.n_atoms < 1 or not 0 <= self.n_nonzero <= self.n_atoms:
            raise UsageError(f"n_atoms={self.n_atoms}, n_nonzero={self.n_nonzero}: expected 0 <= n_nonzero <= n_atoms")
        if self.column_weights is not None and tuple(self.column_weights.shape) != shape[1:]:
            raise UsageError(
                f"column_weights of shape {tuple(self.column_weights.shape)} for a target of shape {shape}"
            )
        if self.column_metric is not None:
            if self.column_weights is not None:
                raise UsageError("column_weights and column_metric exclude each other: put the weights into the metric")
            if tuple(self.column_metric.shape) != (shape[1], shape[1]):
                raise UsageError(
                    f"column_metric of shape {tuple(self.column_metric.shape)} for a target of shape {shape}"
                )
