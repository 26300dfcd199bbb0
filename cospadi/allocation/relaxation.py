"""The multiple-choice knapsack without its integrality: the lower bound and the price of a bit.

With a price p for each bit the choice separates into one for each menu; the largest over p of

    sum_i min_j (c_ij + p b_ij) - p C

bounds the cost of every choice within the capacity C from below.  It is found exactly by walking the lower convex hulls
of the menus by falling cost saved per bit until the capacity is reached (Sinha and Zoltners 1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cospadi.allocation.menu import Menu, pareto_indices

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Points:
    """The entries of all menus that are not dominated, one after the other.

    Attributes
    ----------
    owners, indices : array, shape (n_points,), int64
        Menu of a point, and its index there.
    bits : array, shape (n_points,), int64
        Rising within a menu.
    costs : array, shape (n_points,), float64
        Falling within a menu; multiplied by two to the power ``-exponent``, which makes the largest about 1 and
        rounds nothing.
    starts : array, shape (n_menus + 1,), int64
        First point of each menu.
    exponent : int
        Scale of the costs.
    """

    owners: Ints
    indices: Ints
    bits: Ints
    costs: Floats
    starts: Ints
    exponent: int


@dataclass(frozen=True)
class Relaxation:
    """The optimum without integrality, rounded down to whole entries.

    Attributes
    ----------
    current : array, shape (n_menus,), int64
        A point of each menu that minimises cost plus price times bits; together they fit the capacity.
    price : float
        Of a bit, in scaled cost; 0 where every menu has its entry of least cost.
    rest : int
        Bits of the capacity that ``current`` leaves.
    """

    current: Ints
    price: float
    rest: int

    def excess(self, points: Points) -> Floats:
        """Give what each point costs above its menu's current one with bits at the price; not negative."""
        base = self.current[points.owners]
        costs = points.costs - points.costs[base] + self.price * (points.bits - points.bits[base])
        return np.maximum(costs, 0.0)  # below zero by rounding alone


def flatten(menus: Sequence[Menu]) -> Points:
    """Put the entries that are not dominated one after the other."""
    fronts = [pareto_indices(menu) for menu in menus]
    entries = [menu.entries[i] for menu, front in zip(menus, fronts, strict=True) for i in front]
    costs = np.array([entry.cost for entry in entries], dtype=np.float64)
    exponent = int(np.frexp(costs.max())[1])
    return Points(
        owners=np.repeat(np.arange(len(menus)), [len(front) for front in fronts]),
        indices=np.array([i for front in fronts for i in front], dtype=np.int64),
        bits=np.array([entry.bits for entry in entries], dtype=np.int64),
        costs=np.ldexp(costs, -exponent),
        starts=np.concatenate([[0], np.cumsum([len(front) for front in fronts])]).astype(np.int64),
        exponent=exponent,
    )


def relax(points: Points, capacity: int) -> Relaxation:
    """Solve without integrality; the smallest entries must fit the capacity."""
    start = points.starts[:-1]
    room = capacity - int(points.bits[start].sum())
    assert room >= 0, "the caller checks that the capacity can be reached"
    steps = [step for menu in range(len(start)) for step in _hull_steps(points, menu)]
    # Within a menu the saving per bit falls strictly, so that this order keeps the order of the hull.
    steps.sort(key=lambda step: (-step[0], step[1]))
    current, price = start.copy(), 0.0
    for saving, menu, point in steps:
        growth = int(points.bits[point] - points.bits[current[menu]])
        if growth > room:
            price = saving
            break
        current[menu], room = point, room - growth
    return Relaxation(current, price, room)


def _hull_steps(points: Points, menu: int) -> list[tuple[float, int, int]]:
    """Give the steps along the lower convex hull of one menu: cost saved per bit, the menu, the point reached."""
    first, last = int(points.starts[menu]), int(points.starts[menu + 1])
    bits, costs = points.bits[first:last].tolist(), points.costs[first:last].tolist()
    hull: list[tuple[float, int]] = [(float("inf"), 0)]
    for point in range(1, last - first):
        while True:
            before = hull[-1][1]
            saving = (costs[before] - costs[point]) / (bits[point] - bits[before])
            if saving < hull[-1][0]:
                break
            hull.pop()
        hull.append((saving, point))
    return [(saving, menu, first + point) for saving, point in hull[1:]]
