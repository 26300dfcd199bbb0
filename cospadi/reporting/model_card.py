"""The model card of a checkpoint: what was done, what it cost and how to load it."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cospadi.reporting.schema import Report

TAGS = ["cospadi", "compression", "sparse-dictionary"]


def model_card(report: Report) -> str:
    """Write the README.md of a compressed model.

    Parameters
    ----------
    report : Report
        As in report.json.

    Returns
    -------
    str
        Markdown with YAML front matter.  Every figure is from the report.
    """
    base = report["model"]
    name = Path(base).name
    causal = report["causal"]
    # A path of the compressing machine is not an id that the hub could link to.
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    data = ModelCardData(
        base_model=base if is_id else None,
        base_model_relation="quantized" if is_id else None,
        library_name="transformers",
        pipeline_tag="text-generation" if causal else None,
        tags=TAGS,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}, compressed with cospadi",
        f"{_summary(report)} No weight was trained. The licence of the base model applies.",
        "## Load it",
        _loading(causal),
        "## What it costs",
        _figures(report),
        "## How it was made",
        _method(report),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(report: Report) -> str:
    coefficients = "coefficients" if report["format"] == "dense" else "sparse coefficients"
    counts = {"factors": 0, "sparse": 0, "quantized": 0}
    for row in report["groups"]:
        counts[row["kind"]] += len(row["members"])
    parts = []
    if counts["factors"]:
        parts.append(f"{counts['factors']} are stored as a dictionary times {coefficients}")
    if counts["sparse"]:
        parts.append(f"{counts['sparse']} {'as' if parts else 'are stored as'} sparse matrices")
    if counts["quantized"]:
        parts.append(f"{counts['quantized']} {'as' if parts else 'are stored as'} whole numbers of few bits")
    if report["kept_dense"]:
        parts.append(f"{len(report['kept_dense'])} {'as before' if parts else 'are as before'}")
    return (
        f"Of the linear layers of {Path(report['model']).name} {', '.join(parts)}; "
        "what changed was fitted to the layers' outputs on a calibration text."
    )


def _loading(causal: bool) -> str:
    auto = "AutoModelForCausalLM" if causal else "AutoModel"
    return f"""```python
import cospadi  # first: it teaches transformers to read these layers
from transformers import {auto}

model = {auto}.from_pretrained("PATH_OR_ID")
```

Without `import cospadi` transformers only logs a warning, leaves the compressed layers at random values and returns a
model that writes nonsense. `cospadi.load("PATH_OR_ID")` cannot go wrong in this way.

For tools that cannot import cospadi, make an ordinary dense folder of the original size first:

```shell
cospadi-cli decompress PATH -o DENSE
```"""


def _figures(report: Report) -> str:
    totals, evaluation = report["totals"], report["evaluation"]
    rows = [
        ("bytes of the compressed layers", totals["layer_dense_bytes"], totals["layer_bytes"], totals["ratio"]),
        ("bytes of the whole model", totals["model_dense_bytes"], totals["model_bytes"], totals["model_ratio"]),
    ]
    lines = ["| | before | after | |", "|---|---:|---:|---:|"]
    lines += [f"| {label} | {before:,} | {after:,} | {-ratio:+.1%} |" for label, before, after, ratio in rows]
    if evaluation is not None:
        lines += _perplexities(evaluation)
    notes = (
        "Bytes are those on disk against bfloat16, masks and indices included. By the convention of arXiv 2509.22075, "
        f"which leaves the mask out, the layers' ratio reads {totals['ratio_paper_convention']:.1%}."
    )
    if evaluation is not None:
        notes += f" Evaluation text: {_public(evaluation['text'])}. Perplexity, by {evaluation['definition']}."
    return "\n".join(lines) + "\n\n" + notes


def _perplexities(evaluation: dict[str, Any]) -> list[str]:
    lines = []
    after, before = evaluation["compressed"]["perplexity"], (evaluation["baseline"] or {}).get("perplexity")
    for label in ("token", "word"):
        cells = ["" if one is None or one[label] is None else f"{one[label]:.2f}" for one in (before, after)]
        ratio = evaluation["perplexity_ratio"]
        change = f"x{ratio:.3f}" if label == "token" and ratio is not None else ""
        where = f"{after['n_tokens']} tokens, windows of {after['window']}"
        lines.append(f"| {label} perplexity ({where}) | {cells[0]} | {cells[1]} | {change} |")
    return lines


def _method(report: Report) -> str:
    calibration, totals, config = report["calibration"], report["totals"], report["config"]
    members = [member for row in report["groups"] for member in row["members"]]
    worst = max(members, key=lambda member: member["relative_error"])
    return f"""- cospadi {report["cospadi"]}, solver `{report["solver"]["name"]}`, ratio {config["ratio"]:g} by the \
{config["convention"]} convention, {config["groups"]} groups, {config["allocation"]} allocation
- calibration: {calibration["windows"]} windows of {calibration["seq_len"]} tokens, {_public(calibration["source"])} \
(SHA-256 of the tokens `{calibration["fingerprint"][:16]}...`)
- relative error of the outputs on that text: {totals["mean_relative_error"]:.4f} on average, \
{worst["relative_error"]:.4f} at worst (`{worst["name"]}`)
- every group's sizes, errors and solver statistics are in `report.json`"""


def _public(source: str) -> str:
    """Name a text without the folders of the machine that it lay on."""
    return source if source.startswith("hf:") else Path(source).name
