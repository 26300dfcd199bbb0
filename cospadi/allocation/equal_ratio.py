"""The same ratio for every group, chosen from menus."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from cospadi.allocation.base import Allocation, Allocator, allocation, check_menus
from cospadi.allocation.menu import Menu, pareto_indices
from cospadi.errors import UsageError


@final
@dataclass(frozen=True)
class EqualRatio(Allocator):
    """Gives each group the same fraction of its dense bits, and of the entries that fit the one of least cost.

    A group none of whose entries fits gets its smallest one, which is the dense weights where nothing else is on the
    menu.  Nothing is taken from other groups for that: the capacity may be exceeded, and the note says so.
    """

    def allocate(self, menus: Sequence[Menu], capacity: int) -> Allocation:
        """Choose for each group by itself."""
        begin = time.perf_counter()
        check_menus(menus)
        if capacity < 0:
            raise UsageError(f"a capacity of {capacity} bits: expected no fewer than 0")
        dense = sum(menu.dense_bits for menu in menus)
        indices, over = [], []
        for menu in menus:
            front = pareto_indices(menu)  # costs fall along it: the last that fits costs least
            # The capacity is rounded down to whole bits, so a group may take anything below its part of one bit more.
            # Entries that fit that still sum up to less than one more.
            fitting = [i for i in front if int(menu.entries[i].bits) * dense < (capacity + 1) * menu.dense_bits]
            indices.append(fitting[-1] if fitting else front[0])
            if not fitting:
                over.append(menu.name)
        note = ""
        if over:
            named = ", ".join(over[:3]) + (", ..." if len(over) > 3 else "")
            note = f"{len(over)} of {len(menus)} groups have no entry as small as the ratio asks and get their smallest"
            used = sum(menu.entries[i].bits for menu, i in zip(menus, indices, strict=True))
            note += f" ({named}); {used / dense:.4g} of the dense bytes remain, {capacity / dense:.4g} were asked for"
        return allocation(menus, indices, capacity, seconds=time.perf_counter() - begin, note=note)
