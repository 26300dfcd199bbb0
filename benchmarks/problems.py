"""The one-layer problem that the solver benchmarks share."""

import argparse

import numpy as np


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", help="FILE.npz holding `target`, a whitened layer; default: synthetic, 576 x 1536")
    parser.add_argument("--n-atoms", type=int, default=491)
    parser.add_argument("--n-nonzero", type=int, default=245)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)


def load_target(args: argparse.Namespace) -> np.ndarray:
    """Give the float32 target: a whitened layer, or random columns in directions of falling energy."""
    if args.layer:
        with np.load(args.layer) as file:
            return np.ascontiguousarray(file["target"], dtype=np.float32)
    d, n = 576, 1536
    rng = np.random.default_rng(args.seed)
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
    target = (directions * np.arange(1, d + 1.0) ** -0.6) @ rng.standard_normal((d, n))
    return np.ascontiguousarray(target, dtype=np.float32)


def describe(args: argparse.Namespace, target: np.ndarray) -> dict:
    return {
        "target": "whitened layer" if args.layer else "synthetic, energies falling as i^-0.6",
        "shape": list(target.shape),
        "dtype": str(target.dtype),
        "n_atoms": args.n_atoms,
        "n_nonzero": args.n_nonzero,
        "threads": args.threads,
        "seed": args.seed,
    }
