"""How a group of layers may be stored: kept dense, as factors, or only quantised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cospadi.solvers import Solver

DENSE = "dense"
"""Stands for the dtype of a layer that is kept as it is."""


@dataclass(frozen=True)
class Factors:
    """A dictionary and sparse coefficients.

    Attributes
    ----------
    n_atoms : int
        Columns of the dictionary.
    n_nonzero : int
        Non-zeros in every column of the coefficients.
    side : {"input", "output"}
        Which side of the weight the dictionary is on.  ``input``: W = D S with D (in_features, n_atoms).  ``output``:
        W^T = D S with D (out_features, n_atoms): the layer first multiplies by the sparse factor.
    value_dtype, dictionary_dtype : str
        Of the stored coefficients and of the dictionary; ``none`` for the identity, which is not stored: the weight
        itself is sparse, with ``n_nonzero`` non-zeros in a column on average.
    """

    n_atoms: int
    n_nonzero: int
    side: Literal["input", "output"] = "input"
    value_dtype: str = "bfloat16"
    dictionary_dtype: str = "bfloat16"

    @property
    def kind(self) -> str:
        """The word for reports."""
        return "factors" if self.dictionary_dtype != "none" else "sparse"


@dataclass(frozen=True)
class Quantized:
    """The members' own weights in a dtype of fewer bits each, or as they are.

    Attributes
    ----------
    dtypes : tuple of str
        One per member of the group; ``dense`` keeps a member as it is.
    """

    dtypes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The word for reports."""
        return DENSE if set(self.dtypes) == {DENSE} else "quantized"


Choice = Factors | Quantized


def kept_dense(n_members: int) -> Quantized:
    """Give the choice that keeps every member as it is."""
    return Quantized((DENSE,) * n_members)


def sides(choice: Factors, in_features: int, out_features: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """Give the width of the dictionary's side, and the columns of each stored matrix of coefficients."""
    if choice.side == "input":
        return in_features, tuple(out_features)
    return sum(out_features), (in_features,)


@dataclass(frozen=True)
class Method:
    """How groups are factorised and stored.

    Attributes
    ----------
    solver_name : str
        Registry name, for the report.
    solver : Solver
        The dictionary solver.
    format : str
        How the coefficients are stored.
    seed : int
        Of whatever is random in the solver.
    """

    solver_name: str
    solver: Solver
    format: str
    seed: int
