"""Seconds to code all columns of one layer by matching pursuit: ours, SPAMS and scikit-learn side by side.

    python benchmarks/omp.py [--layer FILE.npz] [--n-atoms 491] [--n-nonzero 245] [--threads 2] [--repeats 7]

FILE.npz holds ``target``, a whitened layer; without it a synthetic target of falling spectrum stands in.  Each
contender has its own process, since SPAMS and numba set up OpenMP differently in one; they take turns.  scikit-learn
codes the first columns only, and its seconds are scaled to all of them.
"""

import argparse
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from common import save_result
from problems import add_problem_options, describe, load_target


def dictionary_of(target, n_atoms, n_nonzero):
    """A dictionary as learning makes it, so that the pursuit meets realistic coherence."""
    from cospadi.solvers import HTP
    from cospadi.solvers.updates import unit_columns
    from cospadi.whitening import Problem

    return unit_columns(HTP(n_iter=5).solve(Problem(target, n_atoms, n_nonzero)).dictionary)[0]


def ours(target, A, n_nonzero, threads):
    import numba

    from cospadi.solvers.coders import BatchOMP

    numba.set_num_threads(threads)
    start = time.perf_counter()
    S = BatchOMP().encode(A, target, n_nonzero).coefficients
    return time.perf_counter() - start, np.linalg.norm(target - A @ S) / np.linalg.norm(target)


def spams(target, A, n_nonzero, threads):
    import spams as package

    Y, A = np.asfortranarray(target), np.asfortranarray(A)
    start = time.perf_counter()
    S = package.omp(Y, A, L=n_nonzero, eps=0.0, lambda1=0.0, numThreads=threads)
    return time.perf_counter() - start, np.linalg.norm(target - A @ S.toarray()) / np.linalg.norm(target)


def sklearn(target, A, n_nonzero, threads, columns=32):
    from sklearn.linear_model import orthogonal_mp_gram

    part = target[:, :columns]
    gram, starts = A.T @ A, A.T @ part
    start = time.perf_counter()
    S = orthogonal_mp_gram(gram, starts, n_nonzero_coefs=n_nonzero)
    seconds = (time.perf_counter() - start) * target.shape[1] / part.shape[1]
    return seconds, np.linalg.norm(part - A @ S) / np.linalg.norm(part)


CONTENDERS = {"ours": ours, "spams": spams, "sklearn": sklearn}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_problem_options(parser)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    os.environ |= {f"{name}_NUM_THREADS": str(args.threads) for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}

    target = load_target(args)
    A = dictionary_of(target, args.n_atoms, args.n_nonzero)
    context = get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, mp_context=context) for name in CONTENDERS}
    seconds = {name: [] for name in CONTENDERS}
    errors = {}
    for repeat in range(args.repeats + 1):  # the first round compiles and warms up
        for name, pool in pools.items():
            taken, errors[name] = pool.submit(CONTENDERS[name], target, A, args.n_nonzero, args.threads).result()
            if repeat:
                seconds[name].append(taken)
    for pool in pools.values():
        pool.shutdown()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {
        name: {
            "seconds_median": round(medians[name], 4),
            "seconds": [round(value, 4) for value in seconds[name]],
            "relative_error": float(errors[name]),
            "times_ours": round(medians[name] / medians["ours"], 2),
        }
        for name in CONTENDERS
    }
    for name, row in figures.items():
        line = f"{row['seconds_median']:8.3f} s   error {row['relative_error']:.5f}   {row['times_ours']:.1f}x ours"
        print(f"{name:8s} {line}")
    save_result("omp", {"problem": describe(args, target), "load_average": os.getloadavg()[0], "contenders": figures})


if __name__ == "__main__":
    main()
