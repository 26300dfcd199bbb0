"""The same ratio for every group, by formula, without a profile."""

from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.allocation.budget import Budget, GroupShape, Size


@dataclass(frozen=True)
class Uniform:
    """Removes the same fraction of every group's bytes.

    Attributes
    ----------
    budget : Budget
        The ratio asked for and how bits are counted.
    """

    budget: Budget

    def allocate(self, shapes: Sequence[GroupShape]) -> list[Size | None]:
        """Size each group by itself; None keeps it dense because a factorisation would save nothing."""
        return [self.budget.size(shape) for shape in shapes]
