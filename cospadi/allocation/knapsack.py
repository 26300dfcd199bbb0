"""The choice of least total cost within the capacity, by an integer programme.

    minimise  sum_i sum_j c_ij x_ij   subject to  sum_i sum_j b_ij x_ij <= C,  sum_j x_ij = 1,  x_ij in {0, 1}

with cost c and bits b of entry j of menu i: the multiple-choice knapsack of ROCKET (arXiv 2602.11008).
"""

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import coo_array

from cospadi.allocation.base import Allocation, Allocator, allocation, check_menus, check_reachable
from cospadi.allocation.menu import Entry, Menu
from cospadi.allocation.relaxation import Ints, Points, Relaxation, flatten, relax
from cospadi.allocation.rest import spend_rest
from cospadi.errors import UsageError

WINDOW = 1e3
"""Scaled objective of the first choice.  HiGHS stops at an absolute gap of 1e-6, a billionth of it."""
LARGEST_ROW = 1e4
"""Scaled bits of the largest step.  Rows may be violated by 1e-6: a ten-billionth of that step, checked afterwards."""
MAX_ROUNDS = 8


@final
@dataclass(frozen=True)
class Knapsack(Allocator):
    """Solves the multiple-choice knapsack with HiGHS, to a relative gap.

    The relaxation gives a lower bound L and a price p of a bit, and a greedy choice an upper bound U.  What a choice
    costs above L is the sum of what its entries cost above their menu's best one at the price, and of p times the bits
    it leaves unused, none of them negative.  So an entry that by itself costs more than U - L above its menu's best is
    in no better choice, and HiGHS gets the few that remain, with this difference as its objective: costs may span many
    orders of magnitude, and its tolerances are relative to what is undecided rather than to the largest cost.

    Attributes
    ----------
    relative_gap : float
        Stop when no choice can be cheaper by more than this fraction of the cost; 0 to go on to the optimum.
    time_limit : float
        Seconds, after which the best choice so far is given, with a note.
    """

    relative_gap: float = 1e-6
    time_limit: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.relative_gap < 1 or not self.time_limit > 0:
            given = f"relative_gap={self.relative_gap}, time_limit={self.time_limit}"
            raise UsageError(f"{given}: expected 0 <= relative_gap < 1 and more than 0 seconds")

    def allocate(self, menus: Sequence[Menu], capacity: int) -> Allocation:
        """Choose the entries of least total cost; the gap that was proved comes with them."""
        begin = time.perf_counter()
        check_menus(menus)
        check_reachable(menus, capacity)
        # Sorted, so that the order in which the menus are given cannot decide between equal choices.
        order = sorted(range(len(menus)), key=lambda i: menus[i].name)
        points = flatten([menus[i] for i in order])
        relaxed = relax(points, capacity)
        best = _fill(points, relaxed.current, capacity)
        best, undecided, note = self._improve(points, relaxed, best, begin + self.time_limit)
        indices = [0] * len(menus)
        for menu, point in zip(order, best, strict=True):
            indices[menu] = int(points.indices[point])
        cost = math.fsum(points.costs[best])
        bound = math.ldexp(max(0.0, cost - undecided), points.exponent)
        seconds = time.perf_counter() - begin
        return allocation(menus, indices, capacity, lower_bound=bound, seconds=seconds, note=note)

    def _improve(self, points: Points, relaxed: Relaxation, best: Ints, deadline: float) -> tuple[Ints, float, str]:
        """Give the best choice, how far above the lower bound it may be (scaled cost), and a note."""
        excess = relaxed.excess(points)
        window = _above(points, relaxed, excess, best)
        proved = 0.0  # of the window, from below
        margin = 0  # bits taken off the capacity because a rounded row was exceeded
        for _ in range(MAX_ROUNDS):
            cost = math.fsum(points.costs[best])
            if window - proved <= self.relative_gap * cost:
                return best, window - proved, ""
            candidates = excess <= window
            candidates[relaxed.current] = False
            columns = np.flatnonzero(candidates)
            if not len(columns):
                return best, 0.0, ""
            left = deadline - time.perf_counter()
            if left <= 0:
                return best, window - proved, self._late("the best of them is kept")
            core = _Core(points, relaxed, excess, columns, window, margin)
            result = core.solve(min(1.0, self.relative_gap * cost / window), left)
            if margin == 0 and result.mip_dual_bound is not None and math.isfinite(result.mip_dual_bound):
                proved = max(proved, min(window, result.mip_dual_bound * window / WINDOW))
            if result.x is None:
                reason = self._late("none of its own was found, a greedy one is kept")
                return best, window - proved, reason if result.status == 1 else f"{result.message}; greedy choice kept"
            found = core.chosen(result.x)
            over = _overshoot(points, relaxed, found)
            if over > 0:
                margin += over
                continue
            before = window
            if (after := _above(points, relaxed, excess, found)) < window:
                best, window = found, after
                proved = min(proved, window)
            if result.status == 1:
                return best, window - proved, self._late("the best of them is kept")
            # A much smaller window lets more entries be excluded and the rest be told apart.
            if window > before / 2:
                return best, window - proved, ""
        reached = window - proved <= self.relative_gap * math.fsum(points.costs[best])
        return best, window - proved, "" if reached else f"stopped after {MAX_ROUNDS} rounds, see the gap"

    def _late(self, kept: str) -> str:
        return f"the time limit of {self.time_limit:g} s was reached before the choice was proved the best; {kept}"


class _Core:
    """The integer programme over the columns left: leave the current entries for others, at most one in each menu."""

    def __init__(
        self, points: Points, relaxed: Relaxation, excess: np.ndarray, columns: Ints, window: float, margin: int
    ) -> None:
        owners = points.owners[columns]
        growth = (points.bits[columns] - points.bits[relaxed.current[owners]]).astype(np.float64)
        room = float(relaxed.rest - margin)
        unit = max(np.abs(growth).max(), abs(room)) / LARGEST_ROW
        menus, rows = np.unique(owners, return_inverse=True)
        n = len(columns)
        self.columns, self.owners, self.current = columns, owners, relaxed.current
        # The last variable is the unused part of the capacity.
        self.objective = np.append(excess[columns], relaxed.price * unit) * (WINDOW / window)
        self.bounds = Bounds(np.zeros(n + 1), np.append(np.ones(n), np.inf))
        self.integrality = np.append(np.ones(n), 0)
        one_each = coo_array((np.ones(n), (rows, np.arange(n))), shape=(len(menus), n + 1)).tocsr()
        capacity = coo_array((np.append(growth / unit, 1.0), (np.zeros(n + 1, int), np.arange(n + 1)))).tocsr()
        self.constraints = [
            LinearConstraint(one_each, -np.inf, 1),
            LinearConstraint(capacity, room / unit, room / unit),
        ]

    def solve(self, relative_gap: float, seconds: float) -> OptimizeResult:
        """Run HiGHS."""
        with _c_output_to_stderr():
            return milp(
                self.objective,
                integrality=self.integrality,
                bounds=self.bounds,
                constraints=self.constraints,
                options={"mip_rel_gap": relative_gap, "time_limit": seconds},
            )

    def chosen(self, x: np.ndarray) -> Ints:
        """Give the point of each menu."""
        chosen = self.current.copy()
        taken = x[:-1] > 0.5
        chosen[self.owners[taken]] = self.columns[taken]
        return chosen


@contextmanager
def _c_output_to_stderr() -> Iterator[None]:
    """Send what C code prints to standard error: HiGHS 1.x has a stray print, and a caller may be writing JSON."""
    if os.name != "posix":
        yield
        return
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        libc.fflush(None)  # its buffer is not Python's
        os.dup2(kept, 1)
        os.close(kept)


def _fill(points: Points, current: Ints, capacity: int) -> Ints:
    """Spend the rest of the capacity greedily."""
    entries = [Entry(int(b), float(c), i) for i, (b, c) in enumerate(zip(points.bits, points.costs, strict=True))]
    finer = [entries[a:b] for a, b in zip(points.starts[:-1], points.starts[1:], strict=True)]
    spent = spend_rest([entries[i] for i in current], finer, capacity)
    return np.array([entry.choice for entry in spent.entries], dtype=np.int64)


def _overshoot(points: Points, relaxed: Relaxation, chosen: Ints) -> int:
    """Bits above the capacity, negative where some are left."""
    return int((points.bits[chosen] - points.bits[relaxed.current]).sum()) - relaxed.rest


def _above(points: Points, relaxed: Relaxation, excess: np.ndarray, chosen: Ints) -> float:
    """Give what a choice costs above the lower bound of the relaxation (scaled cost)."""
    return math.fsum(excess[chosen]) - relaxed.price * _overshoot(points, relaxed, chosen)
