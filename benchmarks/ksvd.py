"""Seconds of one K-SVD alternation and the error after some, for each of its options; other solvers beside it.

    python benchmarks/ksvd.py [--layer FILE.npz] [--n-atoms 491] [--n-nonzero 245] [--n-iter 20] [--solvers]

All rows run in one process.  An alternation is timed from the end of one atom update to the end of the next, so that
the first code is left out; the figures are medians.  ``paper`` means the recipe of arXiv 2509.22075 but for the start:
matching pursuit from scratch, atoms one after the other, eight power steps.  Its array API rows, the first version of
all, need minutes: they do few alternations.
"""

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numba
import torch
from common import save_result
from problems import add_problem_options, describe, load_target
from threadpoolctl import threadpool_limits

from cospadi.arrays import namespace
from cospadi.solvers import relative_error
from cospadi.solvers.coders import BatchOMP
from cospadi.solvers.ksvd import KSVD
from cospadi.whitening import Problem

ERRORS_AFTER = (1, 2, 3, 5, 10, 15, 20, 30, 40, 60)
PAPER = {"block": 1, "power_iterations": 8, "pursue_every": 1}
ARRAYS = {"compiled": False, "coder": BatchOMP(compiled=False)}
SLOW = [
    ("paper, numpy arrays", "numpy", {**PAPER, **ARRAYS}),
    ("paper, torch arrays", "torch", {**PAPER, **ARRAYS}),
]
ROWS = [
    ("paper, compiled", "numpy", PAPER),
    ("paper, compiled, torch", "torch", PAPER),
    ("2 power steps", "numpy", {**PAPER, "power_iterations": 2}),
    ("1 power step", "numpy", {**PAPER, "power_iterations": 1}),
    ("blocks in sequence", "numpy", {"within": "sequence", "pursue_every": 1}),
    ("joint blocks of 16", "numpy", {"block": 16, "pursue_every": 1}),
    ("joint blocks of 32", "numpy", {"pursue_every": 1}),
    ("joint blocks of 64", "numpy", {"block": 64, "pursue_every": 1}),
    ("joint blocks of 256", "numpy", {"block": 256, "pursue_every": 1}),
    ("16 atoms per step", "numpy", {**PAPER, "coder": "gomp"}),
    ("exchange", "numpy", {**PAPER, "pursue_every": 0}),
    ("exchange, exact step", "numpy", {**PAPER, "pursue_every": 0, "relaxation": 1.0, "acceptance": 0.0}),
    ("pursuit every 5th time", "numpy", {**PAPER, "pursue_every": 5}),
    ("default", "numpy", {}),
    ("default, 1 cg step", "numpy", {"cg_steps": 1}),
    ("default, blocks in sequence", "numpy", {"within": "sequence"}),
    ("default, pursuit every 10th time", "numpy", {"pursue_every": 10}),
    ("default, torch, gomp", "torch", {"compiled": False, "coder": "gomp"}),
    ("paper, from columns", "numpy", {**PAPER, "init": "columns"}),
    ("default, from columns", "numpy", {"init": "columns"}),
    ("default, from htp", "numpy", {"init": "htp"}),
    ("default, polished by cg", "numpy", {"polish": "cg"}),
    ("default, polished by htp", "numpy", {"polish": "htp"}),
    ("default, from columns, polished by htp", "numpy", {"init": "columns", "polish": "htp"}),
]


@dataclass(frozen=True, kw_only=True)
class TimedKSVD(KSVD):
    """K-SVD that notes when its atom updates begin and end, and the error after them."""

    clock: ClassVar[list[tuple[float, float, float]]] = []

    def _update(self, Y, A, S, residual):
        start = time.perf_counter()
        A, S, residual = super()._update(Y, A, S, residual)
        end = time.perf_counter()
        xp = namespace(Y)
        self.clock.append((start, end, float(xp.sum(residual * residual) / xp.sum(Y * Y)) ** 0.5))
        return A, S, residual


def seconds_of(function, repeats):
    function()  # compiles and warms up
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 4)


def alternations(target, args, library, options, n_iter):
    from cospadi.arrays import convert

    solver = TimedKSVD(n_iter=n_iter, tolerance=0, **options)
    Y = convert(target, library)
    TimedKSVD.clock.clear()
    start = time.perf_counter()
    solution = solver._factorize(Y, args.n_atoms, args.n_nonzero, args.seed)
    whole = time.perf_counter() - start
    clock = list(TimedKSVD.clock)
    coding = [begin - end for (_, end, _), (begin, _, _) in pairwise(clock)]
    atoms = [end - begin for begin, end, _ in clock]
    rounds = [b - a for (_, a, _), (_, b, _) in pairwise(clock)]
    return {
        "coding": round(statistics.median(coding), 4),
        "atoms": round(statistics.median(atoms), 4),
        "alternation": round(statistics.median(rounds), 4),
        "alternation_mean": round(statistics.mean(rounds), 4),
        "whole": round(whole, 3),
        "error_after": {i: round(clock[i - 1][2], 6) for i in ERRORS_AFTER if i <= len(clock)},
        "error": relative_error(Y, solution),
        "statistics": solution.statistics,
    }


def solvers(target, args):
    from cospadi.solvers import SOLVERS

    d, n = target.shape
    rank = int(args.n_atoms * (d + n / 2 + n / 16) / (d + n))
    rows = {}
    for name, options in [
        ("svd", {}),
        ("single-step", {}),
        ("orthogonal", {}),
        ("htp", {}),
        ("htp", {"n_iter": 30}),
        ("mod", {"n_iter": 5}),
        ("ksvd-numpy", {"n_iter": 5}),
        ("ksvd-numpy", {"n_iter": 60}),
        ("spams", {"n_iter": 5}),
    ]:
        if not SOLVERS.availability(name):
            continue
        k, s = (rank, rank) if name == "svd" else (args.n_atoms, args.n_nonzero)
        if name == "orthogonal" and k > d:
            continue
        solver = SOLVERS.create(name, options)
        solution = solver.solve(Problem(target, k, s, seed=args.seed))
        label = ":".join([name, *(f"{key}={value}" for key, value in options.items())])
        rows[label] = {
            "relative_error": relative_error(target.astype("float64"), solution),
            "seconds_median": seconds_of(
                lambda solver=solver, k=k, s=s: solver.solve(Problem(target, k, s)), args.repeats
            ),
        }
        print(
            f"{label:32s} {rows[label]['seconds_median']:8.3f} s   error {rows[label]['relative_error']:.5f}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_options(parser)
    parser.add_argument("--repeats", type=int, default=3, help="of the solvers")
    parser.add_argument("--n-iter", type=int, default=20)
    parser.add_argument("--slow-n-iter", type=int, default=2, help="alternations of the array API rows, 2 or more")
    parser.add_argument("--only", nargs="*", help="only rows whose name holds one of these; nothing is saved")
    parser.add_argument(
        "--solvers", action="store_true", help="also time whole solves, at the bytes of a bitmask layer"
    )
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        measure(args)


def show(label, row):
    errors = " ".join(f"{i}:{error:.5f}" for i, error in row["error_after"].items())
    print(
        f"{label:40s} {row['alternation']:8.4f} s (coding {row['coding']:.4f}, atoms {row['atoms']:.4f})  "
        f"whole {row['whole']:7.2f} s  error {row['error']:.5f}  {errors}",
        flush=True,
    )


def measure(args):
    target = load_target(args)
    for compiled in (KSVD(), KSVD(**PAPER)):  # the kernels must not be compiled inside a figure
        compiled.solve(Problem(target[:, :64], 32, 8))
    rows = {}
    selected = [row for row in ROWS if not args.only or any(text in row[0] for text in args.only)]
    for label, library, options in selected:
        rows[label] = alternations(target, args, library, options, args.n_iter)
        show(label, rows[label])
    for label, library, options in [] if args.only else SLOW:
        rows[label] = alternations(target, args, library, options, args.slow_n_iter)
        show(label, rows[label])
    figures = {"problem": describe(args, target), "n_iter": args.n_iter, "rows": rows}
    if args.solvers:
        figures["solvers"] = solvers(target, args)
    if args.only:
        return
    save_result("ksvd", {**figures, "load_average": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
