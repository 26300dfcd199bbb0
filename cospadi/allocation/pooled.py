"""One cut through the singular values of all groups."""

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from cospadi.allocation.base import Allocation, Allocator, allocation, check_menus, check_reachable
from cospadi.allocation.menu import Menu, pareto_indices
from cospadi.errors import NumericalError, UsageError

BISECTIONS = 60


@final
@dataclass(frozen=True)
class PooledSpectrum(Allocator):
    """Allocates by the singular values of the whitened targets, after COMPOT (arXiv 2602.15200).

    Each group's singular values are divided by their norm, all are pooled, and the largest are kept until their groups'
    bits (a group's dense bits shared equally by its singular values) fill the capacity.  The fraction of its values
    that a group keeps is the fraction of its bits that it may keep, within the limits.  These fractions times one
    common factor, the largest at which the entries chosen from below fit, meet the capacity; what is left goes to the
    groups furthest below their share.  Predicted costs only order the entries of one group, never two groups.

    Attributes
    ----------
    floor, ceiling : float
        Least and largest fraction of its bits that any group loses.
    """

    floor: float = 0.0
    ceiling: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= self.ceiling <= 1:
            raise UsageError(f"floor={self.floor}, ceiling={self.ceiling}: expected 0 <= floor <= ceiling <= 1")

    def allocate(self, menus: Sequence[Menu], capacity: int) -> Allocation:
        """Choose by the pooled spectrum.

        Raises
        ------
        UsageError
            A menu has no spectrum, or the capacity cannot be met within the ceiling.
        NumericalError
            A spectrum is not finite or negative.
        """
        begin = time.perf_counter()
        check_menus(menus)
        check_reachable(menus, capacity)
        order = sorted(range(len(menus)), key=lambda i: menus[i].name)
        ordered = [menus[i] for i in order]
        kept = kept_fractions(ordered, capacity)
        fronts = [pareto_indices(menu) for menu in ordered]
        bits = [[int(m.entries[i].bits) for i in f] for m, f in zip(ordered, fronts, strict=True)]
        places, shares = self._scale(ordered, kept, bits, capacity)
        places = self._use_rest(ordered, shares, bits, places, capacity)
        indices = [0] * len(menus)
        for menu, front, place in zip(order, fronts, places, strict=True):
            indices[menu] = front[place]
        return allocation(menus, indices, capacity, seconds=time.perf_counter() - begin)

    def _scale(
        self, menus: Sequence[Menu], kept: NDArray[np.float64], bits: list[list[int]], capacity: int
    ) -> tuple[list[int], NDArray[np.float64]]:
        """Find the largest common factor that fits; give the places of the chosen entries and the groups' shares."""
        dense = np.array([menu.dense_bits for menu in menus], dtype=np.float64)

        def at(factor: float) -> tuple[list[int], NDArray[np.float64]]:
            shares = np.clip(factor * kept, 1 - self.ceiling, 1 - self.floor) * dense
            # The allowance is rounded to whole bits: 0.7 times 100 is a little below 70 in floating point.
            allowed = np.floor(shares + 0.5)
            return [
                max(0, int(np.searchsorted(b, a, side="right")) - 1) for b, a in zip(bits, allowed, strict=True)
            ], shares

        def total(places: list[int]) -> int:
            return sum(b[place] for b, place in zip(bits, places, strict=True))

        low, high = 0.0, 1 / kept[kept > 0].min() if kept.any() else 1.0
        least = total(at(low)[0])
        check_reachable(menus, capacity, f" with no group losing more than {self.ceiling:g}", least)
        if total(at(high)[0]) <= capacity:
            return at(high)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if total(at(middle)[0]) <= capacity else (low, middle)
        return at(low)

    def _use_rest(
        self,
        menus: Sequence[Menu],
        shares: NDArray[np.float64],
        bits: list[list[int]],
        places: list[int],
        capacity: int,
    ) -> list[int]:
        """Move the group furthest below its share to its next entry, again and again, while that fits."""
        places = list(places)
        rest = capacity - sum(b[place] for b, place in zip(bits, places, strict=True))

        def ahead(i: int) -> float:
            return (bits[i][places[i]] - shares[i]) / menus[i].dense_bits

        queue = [(ahead(i), i) for i in range(len(menus))]
        heapq.heapify(queue)
        while queue:
            _, i = heapq.heappop(queue)
            if places[i] + 1 == len(bits[i]):
                continue
            following = bits[i][places[i] + 1]
            growth = following - bits[i][places[i]]
            # A group that cannot grow now never can: the rest only shrinks.
            if growth <= rest and following <= (1 - self.floor) * menus[i].dense_bits + 0.5:
                places[i] += 1
                rest -= growth
                heapq.heappush(queue, (ahead(i), i))
        return places


def kept_fractions(menus: Sequence[Menu], capacity: int) -> NDArray[np.float64]:
    """Give the fraction of its singular values that each group keeps when all are pooled and cut once."""
    values, weights, owners = [], [], []
    for i, menu in enumerate(menus):
        if menu.spectrum is None or not len(menu.spectrum):
            raise UsageError(f"{menu.name}: the pooled spectrum needs the singular values of every group")
        spectrum = np.asarray(menu.spectrum, dtype=np.float64)
        if not np.isfinite(spectrum).all() or (spectrum < 0).any():
            raise NumericalError(f"{menu.name}: singular values that are not finite or negative")
        largest = spectrum.max()
        scaled = spectrum / largest if largest > 0 else spectrum  # squares of tiny values would underflow
        values.append(scaled / np.linalg.norm(scaled) if largest > 0 else scaled)
        weights.append(np.full(len(spectrum), menu.dense_bits / len(spectrum)))
        owners.append(np.full(len(spectrum), i))
    owner = np.concatenate(owners)
    descending = np.argsort(-np.concatenate(values), kind="stable")
    inside = np.cumsum(np.concatenate(weights)[descending]) <= capacity * (1 + 1e-12)
    counts = np.bincount(owner[descending[inside]], minlength=len(menus))
    return counts / np.bincount(owner, minlength=len(menus))
