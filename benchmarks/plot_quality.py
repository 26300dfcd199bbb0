"""Draw perplexity against bytes on disk into docs/quality.svg and print the tables of docs/choosing.md.

    python benchmarks/plot_quality.py

Reads benchmarks/results/quality.json and quality-uniform.json.
"""

import json
from pathlib import Path

import matplotlib
from common import RESULTS

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "cospadi"  # the same data give the same file
import matplotlib.pyplot as plt  # noqa: E402

CURVES = {
    "uniform svd": ("SVD, uniform", "o--"),
    "uniform single-step": ("single step (ROCKET), uniform", "v--"),
    "uniform orthogonal": ("orthogonal (COMPOT), uniform", "s--"),
    "uniform htp": ("HTP, uniform", "^--"),
    "learned dictionaries": ("learned dictionaries, allocated", "D-"),
    "factors": ("learned or identity dictionary, allocated", "P-"),
    "quantised only": ("plain quantisation, allocated", "X-"),
    "default": ("default (everything on the menu)", "*-"),
}


def main() -> None:
    data = json.loads((RESULTS / "quality.json").read_text())
    measured = {(row["name"], row["ratio"]) for row in data["rows"]}
    rows = data["rows"] + [row for row in uniform_rows() if (row["name"], row["ratio"]) not in measured]
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for name, (label, style) in CURVES.items():
        points = sorted(
            (100 * (1 - r["honest_ratio"]), r["perplexity_over_dense"]["evaluation"]) for r in named(rows, name)
        )
        if points:
            axes.plot([x for x, _ in points], [y for _, y in points], style, label=label)
    axes.set(yscale="log", xlabel="bytes of the compressed layers on disk, % of bfloat16", ylabel="perplexity / dense")
    ticks = [1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.98)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    axes.set_title(f"{data['model']}, {data['texts']['evaluation']['windows']} windows of 512 tokens", fontsize=10)
    figure.savefig(Path(__file__).parents[1] / "docs" / "quality.svg", metadata={"Date": None})
    for row in sorted(rows, key=lambda r: (r["ratio"], r["perplexity_over_dense"]["evaluation"])):
        found = row["perplexity_over_dense"]
        second = f"{found['docstrings']:.3f}" if "docstrings" in found else "-"
        print(f"| {row['ratio']:.0%} | {row['name']} | {found['evaluation']:.3f} | {second} |")


def uniform_rows() -> list[dict]:
    """Give the rows of the uniform budget in the form of the others."""
    earlier = json.loads((RESULTS / "quality-uniform.json").read_text())["rows"]
    return [
        {
            "name": f"uniform {row['solver']}" + (" + natural groups" if row["groups"] == "natural" else ""),
            "ratio": row["ratio"],
            "honest_ratio": row["honest_ratio"],
            "perplexity_over_dense": {"evaluation": row["perplexity_over_dense"]},
        }
        for row in earlier
    ]


def named(rows: list[dict], name: str) -> list[dict]:
    return [row for row in rows if row["name"] == name]


if __name__ == "__main__":
    main()
