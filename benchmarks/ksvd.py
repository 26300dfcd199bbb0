"""Seconds of one K-SVD alternation, split into coding and atom update, and of the other solvers on the same problem.

    python benchmarks/ksvd.py [--layer FILE.npz] [--n-atoms 491] [--n-nonzero 245] [--repeats 3] [--solvers]

The array-API path codes the first columns only, and its seconds are scaled to all of them.
"""

import argparse
import os
import statistics
import time

import numba
import torch
from common import save_result
from problems import add_problem_options, describe, load_target
from threadpoolctl import threadpool_limits

ARRAY_COLUMNS = 64


def seconds_of(function, repeats):
    function()  # compiles and warms up
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return round(statistics.median(taken), 4)


def alternation(target, args, library, compiled):
    from cospadi.arrays import convert, namespace
    from cospadi.solvers.alternating import initial_dictionary
    from cospadi.solvers.coders import BatchOMP
    from cospadi.solvers.ksvd import KSVD

    Y = convert(target, library)
    solver, coder = KSVD(compiled=compiled), BatchOMP(compiled=compiled)
    A = initial_dictionary(Y, args.n_atoms, args.n_nonzero, "svd", args.seed)
    S = BatchOMP().encode(A, Y, args.n_nonzero).coefficients
    part = Y if compiled else Y[:, :ARRAY_COLUMNS]
    scale = Y.shape[1] / part.shape[1]
    repeats = args.repeats if compiled else 1
    coding = seconds_of(lambda: coder.encode(A, part, args.n_nonzero), repeats) * scale
    atoms = seconds_of(lambda: solver._update(Y, A, S, Y - A @ S), repeats)
    A, S, residual = solver._update(Y, A, S, Y - A @ S)
    xp = namespace(Y)
    error = float(xp.sum(residual * residual) / xp.sum(Y * Y)) ** 0.5
    return {"coding": round(coding, 3), "atoms": atoms, "sum": round(coding + atoms, 3), "error_after_one": error}


def solvers(target, args):
    from cospadi.solvers.base import SOLVERS, Problem, relative_error

    d, n = target.shape
    rank = int(args.n_atoms * (d + n / 2 + n / 16) / (d + n))
    rows = {}
    for name, options in [
        ("svd", {}),
        ("single-step", {}),
        ("orthogonal", {}),
        ("htp", {}),
        ("htp", {"start": "orthogonal"}),
        ("htp", {"n_iter": 30}),
        ("mod", {"n_iter": 5}),
        ("ksvd-numpy", {"n_iter": 5}),
        ("ksvd-numpy", {"n_iter": 5, "init": "columns"}),
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
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--solvers", action="store_true", help="also time whole solves, at the bytes of a bitmask layer"
    )
    args = parser.parse_args()
    numba.set_num_threads(args.threads)
    torch.set_num_threads(args.threads)
    with threadpool_limits(args.threads):
        measure(args)


def measure(args):
    target = load_target(args)
    rows = {}
    for library in ("numpy", "torch"):
        for compiled in (True, False):
            label = f"{library}, {'compiled' if compiled else 'array API'}"
            rows[label] = alternation(target, args, library, compiled)
            print(label, rows[label], flush=True)
    figures = {"problem": describe(args, target), "seconds_per_alternation": rows}
    if args.solvers:
        figures["solvers"] = solvers(target, args)
    save_result("ksvd", {**figures, "load_average": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
