"""Sums over a compressed model, and the files that hold its report: report.json, run.json and the model card."""

import json
from collections.abc import Sequence
from pathlib import Path

from cospadi.files import write_durably
from cospadi.reporting.model_card import model_card
from cospadi.reporting.schema import GroupRow, KeptLayer, Report, RunFacts, Totals


def totals(rows: Sequence[GroupRow], kept_dense: Sequence[KeptLayer], other_bytes: int) -> Totals:
    """Sum up the rows of the groups.

    Parameters
    ----------
    rows : sequence of GroupRow
        The compressed groups.
    kept_dense : sequence of KeptLayer
        Layers that were to be compressed and stay dense; in bfloat16 they count on both sides of the layers' ratio.
    other_bytes : int
        Bytes of every other tensor of the checkpoint (embeddings, norms, biases, layers kept dense).
    """
    kept_dense_bytes = sum(2 * layer["in_features"] * layer["out_features"] for layer in kept_dense)
    layer_bytes = sum(row["bytes"] for row in rows) + kept_dense_bytes
    dense_bytes = sum(row["dense_bytes"] for row in rows) + kept_dense_bytes
    paper_bytes = sum(row["paper_bytes"] for row in rows) + kept_dense_bytes
    members = [member for row in rows for member in row["members"]]
    model_bytes = sum(row["bytes"] for row in rows) + other_bytes
    model_dense = sum(row["dense_bytes"] for row in rows) + other_bytes
    return {
        "n_layers": len(members),
        "n_groups": len(rows),
        "layer_bytes": layer_bytes,
        "layer_dense_bytes": dense_bytes,
        "ratio": 1 - layer_bytes / dense_bytes,
        "ratio_paper_convention": 1 - paper_bytes / dense_bytes,
        "model_bytes": model_bytes,
        "model_dense_bytes": model_dense,
        "model_ratio": 1 - model_bytes / model_dense,
        "mean_relative_error": sum(m["relative_error"] for m in members) / len(members) if members else 0.0,
    }


def write_report(out: str | Path, report: Report) -> None:
    """Write OUT/report.json and the model card OUT/README.md, which says the same in prose."""
    write_durably(Path(out) / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_durably(Path(out) / "README.md", model_card(report).encode())


def write_run(out: str | Path, run: RunFacts) -> None:
    """Write OUT/run.json, whose presence says that the run has ended well."""
    write_durably(Path(out) / "run.json", json.dumps(run, indent=1).encode())
