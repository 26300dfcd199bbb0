"""Costs between the points of a coarse profile."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import PchipInterpolator

from cospadi.errors import NumericalError


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """The predicted cost of one family of options, such as equal rho and dtype, as a function of its bits.

    The logarithm of the cost is interpolated by the monotone cubic of Fritsch and Carlson (1980): costs fall roughly
    exponentially with the bits.  Where the cost reaches zero the last stretch is a straight line.  A point that costs
    more than one of fewer bits gets that one's cost, so that the curve never rises.

    Attributes
    ----------
    bits : array, shape (n_points,), float64
        Rising strictly.
    costs : array, shape (n_points,), float64
        As given: of points with equal bits the least.
    """

    bits: NDArray[np.float64]
    costs: NDArray[np.float64]
    _smooth: PchipInterpolator | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        n_positive = int((self.falling > 0).sum())
        if n_positive > 1:
            smooth = PchipInterpolator(self.bits[:n_positive], np.log(self.falling[:n_positive]), extrapolate=False)
            object.__setattr__(self, "_smooth", smooth)

    @classmethod
    def through(cls, bits: Sequence[float], costs: Sequence[float]) -> "ErrorCurve":
        """Build the curve of measured points in any order.

        Raises
        ------
        ValueError
            There are no points, or not as many bits as costs.
        NumericalError
            A cost is negative or not finite.
        """
        if not len(bits) or len(bits) != len(costs):
            raise ValueError(f"{len(bits)} bits and {len(costs)} costs: expected as many, and at least one")
        b, c = np.asarray(bits, dtype=np.float64), np.asarray(costs, dtype=np.float64)
        if not np.isfinite(c).all() or (c < 0).any():
            raise NumericalError(f"costs {c.min()} to {c.max()} of an error curve: expected finite, not negative")
        order = np.lexsort((c, b))
        _, first = np.unique(b[order], return_index=True)
        return cls(b[order][first], c[order][first])

    @property
    def falling(self) -> NDArray[np.float64]:
        """The costs that the curve passes through: the least of any point with no more bits."""
        return np.minimum.accumulate(self.costs)

    def __call__(self, bits: ArrayLike) -> NDArray[np.float64]:
        """Give the costs at these bits.

        Raises
        ------
        ValueError
            Some bits lie outside the points: nothing is known there.
        """
        at = np.asarray(bits, dtype=np.float64)
        if at.size and not (self.bits[0] <= at.min() and at.max() <= self.bits[-1]):
            raise ValueError(
                f"bits {at.min():.10g} to {at.max():.10g}; the curve is known from {self.bits[0]:.10g} to "
                f"{self.bits[-1]:.10g}"
            )
        costs = np.interp(at, self.bits, self.falling)
        if self._smooth is not None:
            curved = self._smooth(at)  # NaN from the last positive cost on, where the line holds
            # Exponentials of logarithms miss the points by rounding; within their neighbours the curve stays monotone.
            right = np.searchsorted(self.bits, at).clip(1, len(self.bits) - 1)
            curved = np.exp(curved).clip(self.falling[right], self.falling[right - 1])
            costs = np.where(np.isfinite(curved), curved, costs)
        return np.where(np.isin(at, self.bits), np.interp(at, self.bits, self.falling), costs)

    def leave_one_out(self) -> NDArray[np.float64]:
        """Give the relative error at each inner point of the curve through the others.

        The gaps are twice those of the curve itself, so its own errors are smaller where the cost is smooth.

        Returns
        -------
        array, shape (max(n_points - 2, 0),), float64
            Predicted over measured cost, less one; 0 where both are zero, infinity where only the measured one is.
        """
        errors = []
        for i in range(1, len(self.bits) - 1):
            others = ErrorCurve(np.delete(self.bits, i), np.delete(self.costs, i))
            predicted, measured = float(others(self.bits[i])), float(self.costs[i])
            if measured > 0:
                errors.append(predicted / measured - 1)
            else:
                errors.append(0.0 if predicted == 0 else np.inf)
        return np.array(errors, dtype=np.float64)
