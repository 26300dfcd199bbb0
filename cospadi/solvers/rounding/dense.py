"""A dense layer rounded to a grid, without factors."""

from typing import Literal

from torch import Tensor

from cospadi.errors import UsageError
from cospadi.formats import GRIDS
from cospadi.solvers.rounding.gptq import RoundedRows, nearest_rows, round_rows


def quantize_dense(
    rows: Tensor,
    gram: Tensor,
    dtype: str,
    method: Literal["gptq", "nearest"] = "gptq",
    *,
    damping: float = 0.01,
    sweeps: int = 3,
) -> RoundedRows:
    """Round the weight of a linear layer.

    Parameters
    ----------
    rows : Tensor, shape (out_features, in_features), floating, on the CPU
        The weight as torch stores it; not modified.
    gram : Tensor, shape (in_features, in_features)
        X^T X of the layer's inputs.
    dtype : str
        A key of ``GRIDS``.
    method : {"gptq", "nearest"}
        With error feedback in the metric of the Gram, or to nearest by the largest magnitudes, which the Gram then only
        judges.
    damping, sweeps
        See ``round_rows``.

    Raises
    ------
    UsageError
        The dtype or the method is unknown.
    NumericalError
        See ``round_rows``.
    """
    if dtype not in GRIDS:
        raise UsageError(f"dtype {dtype!r} is no grid (the grids are {', '.join(GRIDS)})")
    if method == "nearest":
        return nearest_rows(rows, gram, GRIDS[dtype])
    if method != "gptq":
        raise UsageError(f"method={method!r}: expected 'gptq' or 'nearest'")
    return round_rows(rows, gram, GRIDS[dtype], damping=damping, sweeps=sweeps)
