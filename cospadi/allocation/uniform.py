"""The same ratio for every group."""

from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.allocation.base import Allocator
from cospadi.allocation.budget import GroupShape, Size


@dataclass(frozen=True)
class Uniform(Allocator):
    """Removes the same fraction of every group's bytes."""

    def allocate(self, shapes: Sequence[GroupShape]) -> list[Size | None]:
        """Size each group by itself."""
        return [self.budget.size(shape) for shape in shapes]
