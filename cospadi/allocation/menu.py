"""Every way in which one group of layers may be stored, with its bits and its predicted cost."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cospadi.errors import NumericalError, UsageError

ROUNDING = 1e-9
"""Slack of comparisons between fractions, so that 0.3 given by the user admits 30 of 100 bits removed."""


@dataclass(frozen=True)
class Entry:
    """One way to store a group.

    Attributes
    ----------
    bits : int
        What it takes on disk, with mask, indices and scales.
    cost : float
        Predicted loss increase, zero for the dense weights; only sums and comparisons within one allocation matter.
    choice : Any
        What the caller needs to carry it out; allocation never looks at it.
    """

    bits: int
    cost: float
    choice: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Menu:
    """The entries of one group.

    Attributes
    ----------
    name : str
        Of the group, for messages.
    dense_bits : int
        Bits of the group's dense weights, which removed fractions compare with.
    entries : tuple of Entry
        In the caller's order; at least one.  A menu that was not restricted should hold the dense weights.
    spectrum : array, shape (rank,), float64, optional
        Singular values of the group's whitened target, for ``PooledSpectrum``.

    Raises
    ------
    UsageError
        No entries, or an entry without a positive whole number of bits.
    NumericalError
        A cost that is negative or not finite.
    """

    name: str
    dense_bits: int
    entries: tuple[Entry, ...]
    spectrum: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.entries or self.dense_bits < 1:
            raise UsageError(f"{self.name}: a menu needs entries and dense bits, got {len(self.entries)} entries")
        for entry in self.entries:
            if entry.bits < 1 or entry.bits != int(entry.bits):
                raise UsageError(f"{self.name}: an entry of {entry.bits} bits; expected a positive whole number")
            if not (math.isfinite(entry.cost) and entry.cost >= 0):
                raise NumericalError(f"{self.name}: predicted cost {entry.cost} of an entry of {entry.bits} bits")

    def removed(self, entry: Entry) -> float:
        """Fraction of the dense bits that an entry removes; negative where it takes more than they do."""
        return 1 - entry.bits / self.dense_bits


def pareto_indices(menu: Menu) -> list[int]:
    """Give the indices of the entries that no other one equals or beats in both bits and cost, by rising bits.

    Of equal entries the first in the menu's order stays.
    """
    kept: list[int] = []
    for i in sorted(range(len(menu.entries)), key=lambda i: (menu.entries[i].bits, menu.entries[i].cost, i)):
        if not kept or menu.entries[i].cost < menu.entries[kept[-1]].cost:
            kept.append(i)
    return kept


def restrict(menu: Menu, floor: float = 0.0, ceiling: float = 1.0) -> Menu:
    """Give the menu with the entries that remove between ``floor`` and ``ceiling`` of the dense bits.

    Raises
    ------
    UsageError
        The limits are not ``floor <= ceiling <= 1``, or no entry lies between them.
    """
    if not floor <= ceiling <= 1:
        raise UsageError(f"{menu.name}: limits {floor} to {ceiling} of the removed fraction; expected low <= high <= 1")
    kept = [e for e in menu.entries if floor - ROUNDING <= menu.removed(e) <= ceiling + ROUNDING]
    if not kept:
        removed = sorted(menu.removed(entry) for entry in menu.entries)
        raise UsageError(
            f"{menu.name}: no way of storing it removes between {floor:g} and {ceiling:g} of its bytes; its "
            f"{len(removed)} entries remove {removed[0]:.4g} to {removed[-1]:.4g}: "
            "widen what is asked of this group, or the menu"
        )
    return replace(menu, entries=tuple(kept))
