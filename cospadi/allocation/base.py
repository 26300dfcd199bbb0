"""What an allocation strategy takes and gives: how many atoms and non-zeros each group may spend."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.allocation.budget import Budget, GroupShape, Size


@dataclass(frozen=True)
class Allocator(abc.ABC):
    """Base of the allocation strategies.

    Attributes
    ----------
    budget : Budget
        The ratio asked for and how bits are counted.
    """

    budget: Budget

    @abc.abstractmethod
    def allocate(self, shapes: Sequence[GroupShape]) -> list[Size | None]:
        """Give each group its size; None keeps a group dense because a factorisation would save nothing."""
