"""What a run says of itself: report.json holds the facts, the same for the same run; run.json when, where, how long."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cospadi.backends import processor_name
from cospadi.files import write_durably
from cospadi.reporting.model_card import model_card

Report = dict[str, Any]


def versions() -> dict[str, str]:
    """Give the versions of the libraries that a result depends on."""
    found = {}
    for name in ("cospadi", "torch", "transformers", "numpy", "scipy", "numba", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores, threads, GPU."""
    import os

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "platform": platform.platform(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def totals(rows: list[dict[str, Any]], other_bytes: int, kept_dense_bytes: int) -> dict[str, Any]:
    """Sum up the rows of the groups.

    Parameters
    ----------
    rows : list of dict
        The groups' rows.
    other_bytes : int
        Bytes of every other tensor of the checkpoint (embeddings, norms, biases, layers kept dense).
    kept_dense_bytes : int
        Of these, the bfloat16 bytes of linear layers that were to be compressed but were kept dense; they count on both
        sides of the layers' ratio.
    """
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
