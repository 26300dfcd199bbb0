"""Perplexity of a real model at equal honest bytes, by solver, ratio and grouping.

    python benchmarks/quality.py --calibration calib.txt --evaluation eval.txt --solvers htp,svd --ratios 0.2,0.4

The Grams are collected once and shared by all runs.  Results are merged into
benchmarks/results/quality.json, one entry per (solver, options, ratio, groups).
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from common import RESULTS, save_result

import cospadi
from cospadi.calibration.data import EMBEDDED_EVALUATION, fingerprint, read_text, token_windows
from cospadi.calibration.statistics import Gram
from cospadi.config import CompressionConfig
from cospadi.embedded import embedded_model
from cospadi.evaluation.perplexity import perplexity
from cospadi.models import open_model
from cospadi.pipeline import collect_grams, compress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: the embedded model")
    parser.add_argument("--calibration", help="text file; default: the package's")
    parser.add_argument("--evaluation", help="text file; default: the package's")
    parser.add_argument("--solvers", default="htp,orthogonal,single-step,svd", help="NAME or NAME:key=value:key=value")
    parser.add_argument("--ratios", default="0.2,0.4")
    parser.add_argument("--groups", default="none")
    parser.add_argument("--value-dtype", default="bfloat16")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 512 tokens")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--grams", help="folder that keeps the Grams for the next call")
    parser.add_argument("--name", default="quality", help="name of the result file")
    args = parser.parse_args()

    model = args.model or embedded_model()
    source = open_model(model, torch.device("cpu"))
    calibration = token_windows(source.tokenizer, read_text(args.calibration), 512, args.samples)
    text = read_text(args.evaluation, EMBEDDED_EVALUATION)
    windows = token_windows(source.tokenizer, text, 512, args.windows)
    dense = perplexity(source.model, windows, source.tokenizer)
    print(f"dense: token perplexity {dense.token:.3f}", flush=True)
    start = time.perf_counter()
    folder = Path(args.grams or tempfile.mkdtemp()) / fingerprint(calibration)[:16]
    if folder.is_dir():
        grams = {path.stem: Gram.load(path, path.stem) for path in folder.glob("*.safetensors")}
    else:
        grams = collect_grams(source.model, calibration)
        folder.mkdir(parents=True)
        for name, gram in grams.items():
            gram.save(folder / f"{name}.safetensors")
    print(f"Grams: {time.perf_counter() - start:.0f} s", flush=True)

    rows = _earlier(args.name)
    for groups in args.groups.split(","):
        for ratio in map(float, args.ratios.split(",")):
            for solver in args.solvers.split(","):
                row = _measure(
                    source, solver, ratio, groups, args.value_dtype, calibration, windows, grams, dense.token
                )
                rows = [r for r in rows if [r[k] for k in _KEYS] != [row[k] for k in _KEYS]] + [row]
                print(json.dumps(row), flush=True)
                save_result(
                    args.name,
                    {
                        "model": Path(model).name,
                        "seed": CompressionConfig().seed,
                        "calibration": {"windows": args.samples, "fingerprint": fingerprint(calibration)},
                        "evaluation": {"windows": args.windows, "fingerprint": fingerprint(windows)},
                        "dense_perplexity": dense.token,
                        "rows": sorted(rows, key=lambda r: tuple(str(r[k]) for k in _KEYS)),
                    },
                )


_KEYS = ("groups", "ratio", "solver", "value_dtype")


def _measure(source, solver, ratio, groups, value_dtype, calibration, windows, grams, dense):
    name, *options = solver.split(":")
    config = CompressionConfig(
        solver=name,
        solver_options=dict(option.split("=") for option in options),
        ratio=ratio,
        groups=groups,
        value_dtype=value_dtype,
    )
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        report = compress(source.model, folder / "out", config, windows=calibration, grams=grams)
        seconds = time.perf_counter() - start
        loaded = cospadi.load(folder / "out", dtype=torch.float32)
        found = perplexity(loaded, windows).token
    finally:
        shutil.rmtree(folder)
    totals = report["totals"]
    return {
        "solver": solver,
        "ratio": ratio,
        "groups": groups,
        "value_dtype": value_dtype,
        "honest_ratio": totals["ratio"],
        "paper_ratio": totals["ratio_paper_convention"],
        "mean_relative_error": totals["mean_relative_error"],
        "perplexity": found,
        "perplexity_over_dense": found / dense,
        "seconds_without_grams": seconds,
    }


def _earlier(name: str) -> list[dict]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


if __name__ == "__main__":
    main()
