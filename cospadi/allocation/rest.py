"""Spend the bits that an allocation left over on finer entries."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cospadi.allocation.menu import Entry

Finer: TypeAlias = Sequence[Entry] | Callable[[Entry, int], Entry | None]
"""Entries between those of a group's menu; or a function of the present entry and the bits that it may grow by, which
gives the entry to have instead, None for none."""


@dataclass(frozen=True)
class Spent:
    """The entries after the rest was spent.

    Attributes
    ----------
    entries : tuple of Entry
        One for each group: the one that was chosen, or one of more bits and less cost.
    bits : int
        Their sum.
    unused : float
        Fraction of the capacity that is still left; above what was called enough only if no finer entry fits.
    """

    entries: tuple[Entry, ...]
    bits: int
    unused: float


def spend_rest(chosen: Sequence[Entry], finer: Sequence[Finer], capacity: int, enough: float = 0.0) -> Spent:
    """Upgrade entries by the largest fall of cost per bit while they fit.

    Parameters
    ----------
    chosen : sequence of Entry
        One for each group; their bits fit the capacity.
    finer : sequence
        For each group the entries to upgrade to, in any order, or a function; see ``Finer``.
    capacity : int
        Bits for all groups together.
    enough : float
        Stop as soon as no more than this fraction of the capacity is unused; 0 goes on while anything fits.

    Raises
    ------
    ValueError
        The chosen entries exceed the capacity, or a function gave an entry that does not fit.
    """
    entries = list(chosen)
    bits = sum(int(entry.bits) for entry in entries)
    if bits > capacity:
        raise ValueError(f"the chosen entries take {bits} bits of {capacity}")
    offers: list[tuple[float, int, Entry]] = []

    def offer(group: int) -> None:
        better = _best(entries[group], finer[group], capacity - bits)
        if better is not None:
            heapq.heappush(offers, (-_rate(entries[group], better), group, better))

    for group in range(len(entries)):
        offer(group)
    # A group has at most one offer in the heap, so that equal rates are decided by its place and never by its entry.
    while offers and capacity - bits > enough * capacity:
        _, group, better = heapq.heappop(offers)
        growth = int(better.bits - entries[group].bits)
        if growth <= capacity - bits:
            bits += growth
            entries[group] = better
        offer(group)
    return Spent(tuple(entries), bits, 1 - bits / capacity if capacity else 0.0)


def _rate(old: Entry, new: Entry) -> float:
    return (old.cost - new.cost) / (new.bits - old.bits)


def _best(entry: Entry, finer: Finer, room: int) -> Entry | None:
    """Give the upgrade within the room of the largest fall of cost per bit; of equal ones the smallest."""
    if callable(finer):
        found = finer(entry, room)
        if found is not None and found.bits > entry.bits + room:
            raise ValueError(f"asked for at most {entry.bits + room} bits, the finer entry has {found.bits}")
        candidates = [] if found is None else [found]
    else:
        candidates = [other for other in finer if other.bits <= entry.bits + room]
    candidates = [other for other in candidates if other.bits > entry.bits and other.cost < entry.cost]
    return max(candidates, key=lambda other: (_rate(entry, other), -other.bits), default=None)
