"""Seconds and functional error of solvers on the GPU, at the shapes of one large layer.

    python benchmarks/gpu/solver_times.py --out FILE.json [--shape 4096,4096] [--seconds 80] [--only NAME ...]

The target has directions of falling energy, as whitened layers have.  Iterative solvers run once each with few
iterations; seconds per iteration follow from two runs and are extrapolated to the default number.  A row that would not
fit into the time left is reported as such: nothing is interrupted in the middle.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from cospadi.allocation import Budget, GroupShape
from cospadi.formats import FORMATS
from cospadi.reporting import machine, versions
from cospadi.solvers import SOLVERS, BatchOMP, GeneralizedOMP, Problem, relative_error

GOMP = GeneralizedOMP()
WIDE = BatchOMP(memory_mib=16384)
ROWS = [
    # label, solver, options, few iterations, more iterations, the default number; the most telling first
    ("single-step", "single-step", {}, None, None, None),
    ("htp from single-step", "htp", {"start": "single-step"}, 1, 3, 15),
    ("ksvd-cupy, gomp", "ksvd-cupy", {"coder": GOMP, "pursue_every": 0}, 1, 3, 60),
    ("ksvd-torch, gomp", "ksvd-torch", {"coder": GOMP, "pursue_every": 0}, 1, 3, 60),
    ("ksvd-cupy, omp in 16 GiB", "ksvd-cupy", {"coder": WIDE, "pursue_every": 0}, 1, 1, 60),
    ("ksvd-torch, omp in 16 GiB", "ksvd-torch", {"coder": WIDE, "pursue_every": 0}, 1, 1, 60),
    ("htp", "htp", {}, 1, 1, 15),
    ("ksvd-torch, as it comes", "ksvd-torch", {}, 1, 1, 60),
    ("ksvd-cupy, as it comes", "ksvd-cupy", {}, 1, 1, 60),
]


def target_of(d, n, device, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=generator, device=device))[0]
    energies = torch.arange(1, d + 1, device=device, dtype=torch.float32) ** -0.6
    return ((directions * energies) @ torch.randn(d, n, generator=generator, device=device)).contiguous()


def synchronized(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def timed(name, options, problem, device):
    """Seconds of one solve, and its solution."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # cupy has a memory pool of its own
    solver = SOLVERS.create(name, options)
    start = synchronized(device)
    solution = solver.solve(problem)
    return synchronized(device) - start, solution


def measure(case, problem, device, seconds_left):
    """One row of the result; the more iterations only where they fit into the time left."""
    _, name, options, few, more, usual = case
    state = SOLVERS.availability(name)
    if not state:
        return {"skipped": state.reason}
    if seconds_left < 0:
        return {"skipped": "no time left"}
    start = time.perf_counter()
    first_options = options if few is None else {**options, "n_iter": few}
    timed(name, first_options, Problem(target_of(64, 96, device), 32, 16), device)  # compiles what it needs
    first, solution = timed(name, first_options, problem, device)
    row = {"seconds": first, "iterations": few, "relative_error": relative_error(problem.target, solution)}
    if more is not None and more > few and time.perf_counter() - start + 2 * first < seconds_left:
        del solution
        second, solution = timed(name, {**options, "n_iter": more}, problem, device)
        each = (second - first) / (more - few)
        row = {
            "seconds": second,
            "iterations": more,
            "relative_error": relative_error(problem.target, solution),
            "seconds_per_iteration": each,
            "seconds_extrapolated": first + each * (usual - few),
        }
    return row | {"statistics": solution.statistics}


def shown(label, row):
    """The row as a line of text."""
    if "seconds" not in row:
        return f"{label:28s} {row.get('failed') or row.get('skipped')}"
    text = f"{label:28s} {row['seconds']:8.2f} s ({row['iterations']} it.)  error {row['relative_error']:.5f}"
    if "seconds_per_iteration" in row:
        text += f"  {row['seconds_per_iteration']:7.3f} s/it, {row['seconds_extrapolated']:7.1f} s in all"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", default="4096,4096")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--rho", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=80.0, help="begin no row after so many")
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    begun = time.perf_counter()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    d, n = map(int, args.shape.split(","))
    size = Budget(args.ratio, args.rho, FORMATS.create("bitmask"), "bfloat16").size(GroupShape(d, (n,)))
    problem = Problem(target_of(d, n, device), size.n_atoms, size.n_nonzero)
    print(f"{d}x{n}, {size.n_atoms} atoms, {size.n_nonzero} non-zeros, on {device}", flush=True)
    figures = {
        "shape": [d, n],
        "ratio": args.ratio,
        "n_atoms": size.n_atoms,
        "n_nonzero": size.n_nonzero,
        "target": "synthetic, energies falling as i^-0.6, float32",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "machine": machine(),
        "versions": versions(),
        "rows": [],
    }
    for case in ROWS:
        label = case[0]
        if args.only and not any(text in label for text in args.only):
            continue
        row = {"solver": label}
        try:
            row |= measure(case, problem, device, args.seconds - (time.perf_counter() - begun))
        except Exception as error:  # memory, a missing function of a library: a finding
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if device.type == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            torch.cuda.reset_peak_memory_stats(device)
        figures["rows"].append(row)
        print(shown(label, row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if any("failed" in row for row in figures["rows"]) else 0)


if __name__ == "__main__":
    main()
