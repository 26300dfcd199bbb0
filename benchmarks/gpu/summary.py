"""Short texts from the JSON files of a run.

python benchmarks/gpu/summary.py speed FILE.json        # table of `cospadi-cli bench`
python benchmarks/gpu/summary.py report FILE.json       # totals, evaluation and stages of a compression
python benchmarks/gpu/summary.py perplexities FILE...   # of `cospadi-cli eval --json`; exit code 1 if they differ
"""

import json
import math
import sys
from pathlib import Path
from typing import Any


def speed(path: str) -> None:
    """Print microseconds beside those of the dense product."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    products = {name: f"{rate / 1e12:.0f} TFLOP/s" for name, rate in found["rates"]["products"].items()}
    print(f"copy {found['rates']['bandwidth'] / 1e12:.2f} TB/s, products", products)
    heads = f"{'dense us':>10s}{'cuda us':>10s}{'x dense':>9s}{'of copy':>9s}"
    print(f"{'layer':18s} {'tokens':>6s} {'mode':6s}{heads}  value")
    rows = found["rows"]
    dense = {
        (row["layer"], row["n_tokens"], row["mode"]): row["microseconds"]
        for row in rows
        if row["contender"].startswith("dense torch")
    }
    for row in rows:
        if row["contender"].startswith("dense") or (row["mode"] == "eager" and row["n_tokens"] not in (1, 1024)):
            continue
        at = dense.get((row["layer"], row["n_tokens"], row["mode"]), 0)
        print(
            f"{row['layer']:18s} {row['n_tokens']:6d} {row['mode']:6s} {at:9.1f} {row['microseconds']:9.1f} "
            f"{row['times_dense'] or 0:8.2f} {row['bandwidth_fraction']:8.2f}  {row['value_dtype']}"
        )


def report(path: str) -> None:
    """Print the parts of a report that fit a terminal."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    for key in ("totals", "evaluation"):
        print(key, json.dumps(found.get(key))[:600])
    run = Path(path).with_name("run.json")
    if run.is_file():
        print("stages", json.dumps(json.loads(run.read_text(encoding="utf-8"))["stages"]))


def perplexities(*paths: str) -> None:
    """Print the perplexity of each file; they must agree to one per cent."""
    values = []
    for path in paths:
        try:
            value = _find(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            value = None
            print(f"  {Path(path).stem}: {error}")
        print(f"  {Path(path).stem}: perplexity {value}")
        values.append(value)
    agree = all(value and math.isfinite(value) for value in values) and max(values) / min(values) < 1.01
    print("perplexities agree" if agree else "perplexities DO NOT agree")
    sys.exit(not agree)


def _find(node: Any) -> float | None:
    """Give the first perplexity per token inside a JSON value."""
    if isinstance(node, dict):
        if "perplexity" in node:
            value = node["perplexity"]
            return value["token"] if isinstance(value, dict) else value
        return next((found for found in map(_find, node.values()) if found is not None), None)
    return None


if __name__ == "__main__":
    {"speed": speed, "report": report, "perplexities": perplexities}[sys.argv[1]](*sys.argv[2:])
