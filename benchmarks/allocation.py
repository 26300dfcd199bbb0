"""Cost, proved gap and seconds of the allocation strategies on random menus shaped like those of a model.

    python benchmarks/allocation.py

``plain`` is the whole integer programme given to HiGHS at once, costs scaled by the largest and the same relative gap:
what ``Knapsack`` would be without its relaxation.
"""

import argparse
import time

import numpy as np
from common import save_result
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, csr_array

from cospadi.allocation.base import Allocation, allocation, capacity_for
from cospadi.allocation.equal_ratio import EqualRatio
from cospadi.allocation.knapsack import Knapsack
from cospadi.allocation.menu import Entry, Menu
from cospadi.allocation.pooled import PooledSpectrum
from cospadi.allocation.relaxation import flatten

SIZES = [(120, 60), (1000, 60)]
RATIOS = [0.2, 0.5, 0.75]
SHAPES = [(576, 960), (576, 576), (576, 3072), (1536, 576)]
DECADES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for n_menus, n_entries in SIZES:
        for seed in range(args.seeds):
            menus = like_a_model(n_menus, n_entries, seed)
            for ratio in RATIOS:
                capacity = capacity_for(menus, ratio)
                found = {
                    "uniform": EqualRatio().allocate(menus, capacity),
                    "pooled-spectrum": PooledSpectrum().allocate(menus, capacity),
                    "knapsack": Knapsack().allocate(menus, capacity),
                    "plain": plain(menus, capacity, Knapsack().relative_gap),
                }
                best = found["knapsack"].cost
                for name, one in found.items():
                    row = {
                        "menus": n_menus,
                        "entries": n_entries,
                        "seed": seed,
                        "ratio": ratio,
                        "strategy": name,
                        "cost": one.cost,
                        "cost_over_knapsack": one.cost / best,
                        "gap": one.gap,
                        "unused": one.unused,
                        "seconds": one.seconds,
                        "note": one.note,
                    }
                    rows.append(row)
                    print(f"{n_menus:5d} {seed} {ratio} {name:16s} {one.cost / best:.9f} {one.gap} {one.seconds:.2f} s")
    save_result("allocation", {"decades": DECADES, "rows": rows})


def like_a_model(n_menus: int, n_entries: int, seed: int) -> list[Menu]:
    """Six families of exponentially falling curves for each group; its sensitivity spans ``DECADES`` powers of ten."""
    rng = np.random.default_rng(seed)
    menus = []
    for i in range(n_menus):
        rows, columns = SHAPES[i % len(SHAPES)]
        dense = 16 * rows * columns
        sensitivity = 10 ** rng.uniform(-DECADES, 0)
        families = [(rng.uniform(3, 9), rng.uniform(0.5, 2)) for _ in range(6)]
        entries = [Entry(dense, 0.0)]
        for j in range(n_entries - 1):
            decay, start = families[j % 6]
            kept = rng.uniform(0.1, 0.95)
            entries.append(Entry(int(dense * kept), sensitivity * start * np.exp(-decay * kept)))
        spectrum = np.exp(-np.arange(min(rows, columns)) / (rng.uniform(0.05, 1) * rows))
        menus.append(Menu(f"group{i}", dense, tuple(entries), spectrum))
    return menus


def plain(menus: list[Menu], capacity: int, relative_gap: float) -> Allocation:
    """Solve the whole integer programme at once."""
    begin = time.perf_counter()
    points = flatten(menus)
    n = len(points.bits)
    largest = points.costs.max()
    one_each = coo_array((np.ones(n), (points.owners, np.arange(n))), shape=(len(menus), n)).tocsr()
    result = milp(
        points.costs / largest,
        integrality=np.ones(n),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(points.bits[None] / capacity * 1e4), -np.inf, 1e4),
        ],
        options={"mip_rel_gap": relative_gap, "time_limit": 60},
    )
    chosen = np.flatnonzero(result.x > 0.5)
    bound = float(np.ldexp(max(result.mip_dual_bound, 0.0) * largest, points.exponent))
    seconds = time.perf_counter() - begin
    note = "" if result.status == 0 else result.message
    return allocation(menus, points.indices[chosen], capacity, lower_bound=bound, seconds=seconds, note=note)


if __name__ == "__main__":
    main()
