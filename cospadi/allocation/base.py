"""The contract of an allocation strategy: menus and a capacity in, one entry of each menu out."""

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.allocation.menu import Entry, Menu
from cospadi.errors import UsageError


@dataclass(frozen=True)
class Allocation:
    """One entry of each menu.

    Attributes
    ----------
    indices : tuple of int
        Of the chosen entry in each menu's ``entries``.
    entries : tuple of Entry
        The chosen entries themselves.
    bits : int
        Their sum.
    cost : float
        The sum of their predicted costs.
    capacity : int
        The bits that were allowed.
    lower_bound : float, optional
        No choice within the capacity costs less; None where the strategy proves nothing.
    seconds : float
        Wall time of the allocation.
    note : str
        Whatever the user should know, such as a time limit that was hit; empty when all went well.
    """

    indices: tuple[int, ...]
    entries: tuple[Entry, ...]
    bits: int
    cost: float
    capacity: int
    lower_bound: float | None = None
    seconds: float = 0.0
    note: str = ""

    @property
    def gap(self) -> float | None:
        """Largest fraction of the cost that a better choice could save; None where nothing is proved."""
        if self.lower_bound is None:
            return None
        return (self.cost - self.lower_bound) / self.cost if self.cost > 0 else 0.0

    @property
    def unused(self) -> float:
        """Fraction of the capacity that the chosen entries leave; negative where they exceed it."""
        return 1 - self.bits / self.capacity if self.capacity else 0.0


@dataclass(frozen=True)
class Allocator(abc.ABC):
    """Base of the allocation strategies; the fields of a strategy are its options."""

    @abc.abstractmethod
    def allocate(self, menus: Sequence[Menu], capacity: int) -> Allocation:
        """Choose one entry of each menu.

        The same menus in another order get the same entries, and nothing depends on chance.

        Parameters
        ----------
        menus : sequence of Menu
            One for each group, with names of their own; limits of a group are already applied to its entries.
        capacity : int
            Bits for all groups together.

        Raises
        ------
        UsageError
            The capacity cannot be met.
        """


def allocation(
    menus: Sequence[Menu],
    indices: Sequence[int],
    capacity: int,
    *,
    lower_bound: float | None = None,
    seconds: float = 0.0,
    note: str = "",
) -> Allocation:
    """Sum up the chosen entries."""
    entries = tuple(menu.entries[i] for menu, i in zip(menus, indices, strict=True))
    cost = math.fsum(entry.cost for entry in entries)  # exact, so that it does not depend on the order of the menus
    bits = sum(int(entry.bits) for entry in entries)
    bound = None if lower_bound is None else min(lower_bound, cost)
    return Allocation(tuple(int(i) for i in indices), entries, bits, cost, capacity, bound, seconds, note)


def capacity_for(menus: Sequence[Menu], ratio: float) -> int:
    """Give the bits that remain when a fraction of the dense bits is removed, to the nearest bit."""
    return round((1 - ratio) * sum(menu.dense_bits for menu in menus))


def check_menus(menus: Sequence[Menu]) -> None:
    """Raise UsageError unless there are menus and each has a name of its own."""
    names = {menu.name for menu in menus}
    if not menus or len(names) < len(menus):
        raise UsageError(f"{len(menus)} menus with {len(names)} names: expected at least one, each named differently")


def check_reachable(menus: Sequence[Menu], capacity: int, why: str = "", smallest: int | None = None) -> None:
    """Raise UsageError when even the smallest entry of every menu exceeds the capacity.

    Parameters
    ----------
    menus : sequence of Menu
        One for each group.
    capacity : int
        Bits that are allowed.
    why : str
        What else keeps the size up, for the text.
    smallest : int, optional
        The smallest size that can be reached, where it is not the sum of the smallest entries.
    """
    if smallest is None:
        smallest = sum(min(int(entry.bits) for entry in menu.entries) for menu in menus)
    if smallest <= capacity:
        return
    dense = sum(menu.dense_bits for menu in menus)
    most = round(1 - smallest / dense, 4)
    if capacity_for(menus, most) < smallest:
        most = round(most - 1e-4, 4)
    raise UsageError(
        f"cannot keep only {capacity / dense:.4g} of the dense bytes: the smallest size that can be reached is "
        f"{smallest / dense:.4g} of them{why}; ask for a ratio of at most {most:g}, or allow smaller entries"
    )
