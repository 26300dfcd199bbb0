"""Perplexity of the embedded model against the bytes on disk, for each method and with each ingredient left out.

    python benchmarks/quality.py --calibration calib.txt --evaluation eval.txt --cache FOLDER

Statistics and profiles are collected once and shared through the cache.  Every run is added to
benchmarks/results/quality.json under its name and ratio; ``--only`` takes some of them.  The second text, of another
source than the calibration, are the docstrings of numpy's functions; ``benchmarks/plot_quality.py`` draws the picture.
"""

import argparse
import inspect
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, save_result

import cospadi
from cospadi.calibration.data import EMBEDDED_EVALUATION, fingerprint, read_text, token_windows
from cospadi.evaluation import perplexity
from cospadi.models import embedded_model, open_model
from cospadi.pipeline import compress
from cospadi.recipe import CompressionConfig

FACTORS = {"storage": "factors", "value_dtype": "bfloat16"}
LEARNED = FACTORS | {"dictionary": "learned"}
UNIFORM = {"allocation": "uniform", "column_weights": False, "groups": "none"}
RUNS: dict[str, tuple[dict, tuple[float, ...]]] = {
    # the frontier
    "default": ({}, (0.2, 0.5, 0.65, 0.75)),
    "quantised only": ({"storage": "quantized"}, (0.5, 0.65, 0.75)),
    "factors": (FACTORS, (0.2, 0.3, 0.4, 0.5)),
    "learned dictionaries": (LEARNED, (0.2, 0.3, 0.4, 0.5)),
    "learned, 10 iterations": (LEARNED | {"solver": "htp", "solver_options": {"n_iter": 10}}, (0.2,)),
    "learned dictionaries, admm": (LEARNED | {"solver": "admm"}, (0.2,)),
    "sparse weights": (FACTORS | {"dictionary": "identity"}, (0.2,)),
    "8-bit factors": ({"storage": "factors", "value_dtype": "int8"}, (0.5, 0.65)),
    # published methods and the uniform budget
    "uniform svd": (UNIFORM | {"solver": "svd"}, (0.2, 0.4)),
    "uniform single-step": (UNIFORM | {"solver": "single-step"}, (0.2, 0.4)),
    "uniform orthogonal": (UNIFORM | {"solver": "orthogonal"}, (0.2, 0.4)),
    "uniform htp": (UNIFORM | {"solver": "htp"}, (0.2, 0.4)),
    "uniform ksvd": (UNIFORM | {"solver": "ksvd-numpy"}, (0.2,)),
    # one ingredient added to the uniform budget
    "uniform htp + natural groups": (UNIFORM | {"solver": "htp", "groups": "natural"}, (0.2, 0.4)),
    "uniform htp + column weights": (UNIFORM | {"solver": "htp", "column_weights": True}, (0.2,)),
    "uniform htp + allocation": (
        LEARNED | {"groups": "none", "column_weights": False, "rho": 2.0, "side": "input"},
        (0.2,),
    ),
    # one ingredient left out
    "learned - natural groups": (LEARNED | {"groups": "none"}, (0.2,)),
    "learned - column weights": (LEARNED | {"column_weights": False}, (0.2,)),
    "learned - side": (LEARNED | {"side": "input"}, (0.2, 0.4)),
    "learned - rho": (LEARNED | {"rho": 2.0}, (0.2,)),
    "learned - allocation": (LEARNED | {"allocation": "equal-ratio"}, (0.2,)),
    # other costs, labels, strategies and orders
    "cost functional-error": (FACTORS | {"cost": "functional-error"}, (0.2,)),
    "cost relative-error": (FACTORS | {"cost": "relative-error"}, (0.2,)),
    "pooled-spectrum": (FACTORS | {"allocation": "pooled-spectrum"}, (0.2,)),
    "learned + token weights": (LEARNED | {"token_weights": True}, (0.2,)),
    "learned, labels of the text": (LEARNED | {"calibration": {"labels": "text"}}, (0.2,)),
    "factors, sequential": (FACTORS | {"calibration": {"order": "sequential"}}, (0.2, 0.4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder; default: the embedded model")
    parser.add_argument("--calibration", help="text file; default: the package's")
    parser.add_argument("--evaluation", help="text file; default: the package's")
    parser.add_argument("--only", action="append", metavar="NAME[@RATIO]", help="runs to do; default: all. Repeatable.")
    parser.add_argument("--windows", type=int, default=40, help="evaluation windows of 512 tokens")
    parser.add_argument("--second-windows", type=int, default=10, help="windows of the second text")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens")
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps statistics and profiles")
    parser.add_argument("--name", default="quality", help="name of the result file")
    args = parser.parse_args()

    model = args.model or embedded_model()
    source = open_model(model, torch.device("cpu"))
    calibration = token_windows(source.tokenizer, read_text(args.calibration), 512, args.samples)
    text = read_text(args.evaluation, EMBEDDED_EVALUATION)
    texts = {
        "evaluation": token_windows(source.tokenizer, text, 512, args.windows),
        "docstrings": token_windows(source.tokenizer, docstrings(), 512, args.second_windows),
    }
    dense = {name: perplexity(source.model, windows).token for name, windows in texts.items()}
    print("dense:", dense, flush=True)
    for name, ratio in wanted(args.only):
        row = measure(source, name, ratio, calibration, texts, dense, args.cache)
        print(json.dumps(row), flush=True)
        rows = [r for r in earlier(args.name) if (r["name"], r["ratio"]) != (name, ratio)] + [row]
        save_result(
            args.name,
            {
                "model": Path(model).name,
                "seed": CompressionConfig().seed,
                "calibration": {"windows": args.samples, "fingerprint": fingerprint(calibration)},
                "texts": {
                    name: {"windows": len(w), "fingerprint": fingerprint(w), "dense_perplexity": dense[name]}
                    for name, w in texts.items()
                },
                "rows": sorted(rows, key=lambda r: (list(RUNS).index(r["name"]), r["ratio"])),
            },
        )


def docstrings() -> str:
    """Join the docstrings of numpy's public functions and classes."""
    found = [inspect.getdoc(getattr(np, name)) for name in sorted(np.__all__) if callable(getattr(np, name, None))]
    return "\n".join(text for text in found if text)


def wanted(only: list[str] | None) -> list[tuple[str, float]]:
    """List the runs that were asked for, in the order in which they were asked for."""
    every = [(name, ratio) for name, (_, ratios) in RUNS.items() for ratio in ratios]
    if not only:
        return every
    return [(name, ratio) for text in only for name, ratio in every if text in (name, f"{name}@{ratio:g}")]


def measure(source, name, ratio, calibration, texts, dense, cache):
    config = CompressionConfig.from_dict({"ratio": ratio, **RUNS[name][0]})
    folder = Path(tempfile.mkdtemp())
    try:
        start = time.perf_counter()
        report = compress(source.model, folder / "out", config, windows=calibration, cache=cache)
        seconds = time.perf_counter() - start
        stages = json.loads((folder / "out" / "run.json").read_text())["stages"]
        loaded = cospadi.load(folder / "out", dtype=torch.float32)
        found = {text: perplexity(loaded, windows).token / dense[text] for text, windows in texts.items()}
    finally:
        shutil.rmtree(folder)
    totals = report["totals"]
    return {
        "name": name,
        "ratio": ratio,
        "honest_ratio": totals["ratio"],
        "paper_ratio": totals["ratio_paper_convention"],
        "layer_bytes": totals["layer_bytes"],
        "perplexity_over_dense": found,
        "chosen": chosen(report),
        "allocation": report["allocation"],
        "solved_loss_increase": sum(row["loss_increase"] for row in report["groups"]),
        "mean_relative_error": totals["mean_relative_error"],
        "seconds": {"all": seconds, **stages},
    }


def chosen(report) -> dict[str, dict[str, int]]:
    """Count the layers of each kind by how they are stored."""
    counts: dict[str, dict[str, int]] = {}
    for row in report["groups"]:
        label = row["dictionary_dtype"]
        if row["kind"] != "quantized":
            label = f"{row['kind']} {row['value_dtype']}{' of W^T' if row['side'] == 'output' else ''}"
        for member in row["members"]:
            kind = counts.setdefault(member["name"].rpartition(".")[2], {})
            kind[label] = kind.get(label, 0) + 1
    for layer in report["kept_dense"]:
        kind = counts.setdefault(layer["name"].rpartition(".")[2], {})
        kind["dense"] = kind.get("dense", 0) + 1
    return counts


def earlier(name: str) -> list[dict]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()).get("rows", []) if path.exists() else []


if __name__ == "__main__":
    main()
