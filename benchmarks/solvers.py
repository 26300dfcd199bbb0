"""Functional error and seconds of every solver on named layers of the embedded model, at equal honest bytes.

    python benchmarks/solvers.py --statistics FOLDER

FOLDER is the cache that ``benchmarks/quality.py --cache`` leaves (one folder in it for each calibration).
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from common import save_result

from cospadi.allocation import Budget, GroupShape
from cospadi.calibration import SourceStatistics
from cospadi.formats import FORMATS
from cospadi.models import embedded_model, open_model, weight_matrix
from cospadi.pipeline import is_record, payloads
from cospadi.solvers import SOLVERS, relative_error
from cospadi.whitening import Problem, whitening_from_gram

LAYERS = {
    "model.layers.2.self_attn.q_proj": "model.layers.2.self_attn.q_proj",
    "model.layers.2.mlp.up_proj": "model.layers.2.mlp.gate_proj",
    "model.layers.15.self_attn.v_proj": "model.layers.15.self_attn.q_proj",
    "model.layers.15.self_attn.o_proj": "model.layers.15.self_attn.o_proj",
    "model.layers.15.mlp.gate_proj": "model.layers.15.mlp.gate_proj",
    "model.layers.15.mlp.down_proj": "model.layers.15.mlp.down_proj",
    "model.layers.27.self_attn.k_proj": "model.layers.27.self_attn.q_proj",
    "model.layers.27.mlp.down_proj": "model.layers.27.mlp.down_proj",
}
"""Layer to the layer under whose name the Gram of its input is kept."""

PAPER = {"block": 1, "power_iterations": 8, "pursue_every": 1, "init": "columns", "tolerance": 0, "n_iter": 20}
SOLVERS_AND_OPTIONS = [
    ("svd", {}),
    ("single-step", {}),
    ("orthogonal", {}),
    ("ksvd-numpy", PAPER),
    ("ksvd-numpy", {}),
    ("ksvd-numpy", {"init": "htp", "polish": "htp"}),
    ("htp", {}),
    ("htp", {"n_iter": 60}),
    ("admm", {}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--statistics", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--targets", type=Path, help="also save each whitened layer there, as NAME.npz")
    args = parser.parse_args()
    folder = next(p for p in sorted(args.statistics.iterdir()) if p.is_dir())
    modules = dict(open_model(embedded_model(), torch.device("cpu")).model.named_modules())
    rows = []
    for name, source in LAYERS.items():
        record = next(path for path in payloads(folder, source) if is_record(path, source))
        gram = SourceStatistics.load(record).gram
        whitening = whitening_from_gram(gram.matrix, gram.n_tokens)
        target = whitening.whiten(weight_matrix(modules[name])).float()
        if args.targets:
            args.targets.mkdir(parents=True, exist_ok=True)
            np.savez(args.targets / f"{name}.npz", target=target.numpy())
        shape = GroupShape(target.shape[0], (target.shape[1],))
        for solver_name, options in SOLVERS_AND_OPTIONS:
            solver = SOLVERS.create(solver_name, options)
            codec = FORMATS.create("bitmask" if solver.sparse else "dense")
            size = Budget(args.ratio, 2.0, codec, "bfloat16", sparse=solver.sparse).size(shape)
            start = time.perf_counter()
            solution = solver.solve(Problem(target, size.n_atoms, size.n_nonzero))
            row = {
                "layer": name,
                "shape": list(target.shape),
                "solver": ":".join([solver_name, *(f"{k}={v}" for k, v in options.items())]),
                "n_atoms": size.n_atoms,
                "n_nonzero": size.n_nonzero,
                "relative_error": relative_error(target.double(), solution_in_double(solution)),
                "seconds": time.perf_counter() - start,
                "statistics": solution.statistics,
            }
            rows.append(row)
            print(f"{name:36s} {row['solver']:52s} {row['relative_error']:.5f} {row['seconds']:8.2f} s", flush=True)
    save_result("solvers", {"ratio": args.ratio, "statistics": folder.name, "rows": rows})


def solution_in_double(solution):
    return type(solution)(solution.dictionary.double(), solution.coefficients.double())


if __name__ == "__main__":
    main()
