"""Tables of a compression's report, of an evaluation and of a checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from cospadi_cli.console import console, make_table, print_table, printable, size

Json = Mapping[str, Any]
"""A part of report.json, or what has its form."""


def show_report(report: Json, out: Path) -> None:
    """Show the outcome of a compression: sizes, perplexities, worst layers, samples and how to load it."""
    screen, totals, evaluation = console(), report["totals"], report["evaluation"]
    table = make_table("", "before", "after", "change", left=[""])
    for label, key in (("compressed layers", "layer"), ("whole model", "model")):
        before, after = totals[f"{key}_dense_bytes"], totals[f"{key}_bytes"]
        table.add_row(label, size(before), size(after), f"{after / before - 1:+.1%}")
        if key == "layer":
            paper = f"{-totals['ratio_paper_convention']:+.1%}"
            table.add_row("  by the paper's count", "", "", paper, style="dim")
    if evaluation is not None:
        _add_measurements(table, evaluation)
    print_table(f"{report['model']} -> {out}", table)
    screen.print("The paper's count (arXiv 2509.22075) leaves the mask out.", style="dim")
    if evaluation is not None:
        _show_protocol(evaluation)
    _show_storage(report)
    _show_worst(report["groups"])
    if evaluation is None:
        screen.print("Not evaluated: switched off, or not a causal language model.")
    else:
        _show_samples(evaluation)
    screen.print(f"\nThe model is in {out}. To use it:", markup=False)
    screen.print(f'  python -c "import cospadi; model = cospadi.load({str(out)!r})"', markup=False, soft_wrap=True)
    screen.print(f"  cospadi-cli generate {out} --prompt 'Once upon a time'", markup=False, soft_wrap=True)


def show_evaluation(path: str, evaluation: Json) -> None:
    """Show an evaluation, beside the baseline if there is one."""
    columns = ("baseline", "model", "change") if evaluation["baseline"] else ("value",)
    table = make_table("", *columns, left=[""])
    _add_measurements(table, evaluation)
    print_table(path, table)
    _show_protocol(evaluation)


def show_inspection(path: str, inspection: Json) -> None:
    """Show the groups of a checkpoint."""
    rows, totals = inspection["groups"], inspection["totals"]
    columns = ("layer", "in", "out", "stored as", "atoms", "non-zero", "error", "bytes", "removed")
    table = make_table(*columns, left=["layer"])
    for row in rows:
        members = row["members"]
        sizes = ["-" if row[key] is None else str(row[key]) for key in ("n_atoms", "n_nonzero")]
        table.add_row(
            row["name"],
            str(row["in_features"]),
            str(members[0]["out_features"]) if len(members) == 1 else "",
            stored_as(row),
            *sizes,
            _error(row["relative_error"]),
            size(row["bytes"]),
            f"{1 - row['bytes'] / row['dense_bytes']:.1%}",
        )
        for member in members if len(members) > 1 else ():
            shape = ("", str(member["out_features"]), "", "", "")
            cells = (_error(member["relative_error"]), size(member["bytes"]), "")
            table.add_row(f"  {member['name']}", *shape, *cells, style="dim")
    print_table(path, table)
    before, after = totals["layer_dense_bytes"], totals["layer_bytes"]
    console().print(
        f"{totals['n_layers']} layers in {totals['n_groups']} groups: {size(after)} of {size(before)} "
        f"({1 - after / before:.1%} removed)"
    )
    _show_worst(rows)


def stored_as(row: Json) -> str:
    """Say in a few words how a group is stored."""
    if row["kind"] == "quantized":
        return str(row["dictionary_dtype"])
    if row["kind"] == "sparse":
        return f"sparse {row['value_dtype']}"
    return f"factors {row['value_dtype']}{' of W^T' if row['side'] == 'output' else ''}"


def _add_measurements(table: Table, evaluation: Json) -> None:
    """Add the rows of perplexity and multiple choice; the columns are baseline (if measured), model, change."""
    model, baseline = evaluation["compressed"], evaluation["baseline"]

    def add(label: str, section: str, key: str, form: str, change: str) -> None:
        values = [one[section][key] for one in (baseline, model) if one is not None]
        cells = ["-" if value is None else format(value, form) for value in values]
        table.add_row(label, *cells, *([change] if baseline is not None else []))

    ratio = evaluation["perplexity_ratio"]
    factor = f"x{ratio:.3f}" if ratio is not None else ""
    add("token perplexity", "perplexity", "token", ".2f", factor)
    add("word perplexity", "perplexity", "word", ".2f", "")
    if model["choices"] is not None:
        add("multiple choice, accuracy", "choices", "accuracy", ".1%", "")
        add("  normalised by length", "choices", "accuracy_normalized", ".1%", "")
        add("  by guessing", "choices", "chance", ".1%", "")


def _show_storage(report: Json) -> None:
    """Show the layers and bytes of each kind of storage, and the note of the allocation."""
    table = make_table("stored as", "layers", "bytes", "of dense", left=["stored as"])
    rows: dict[str, list[float]] = {}
    for row in report["groups"]:
        sums = rows.setdefault(stored_as(row), [0, 0, 0])
        for place, value in enumerate((len(row["members"]), row["bytes"], row["dense_bytes"])):
            sums[place] += value
    dense = [2 * layer["in_features"] * layer["out_features"] for layer in report["kept_dense"]]
    if dense:
        rows["dense, unchanged"] = [len(dense), sum(dense), sum(dense)]
    for label, (count, after, before) in sorted(rows.items()):
        table.add_row(label, str(count), size(after), f"{after / before:.1%}")
    print_table("\nHow the layers are stored", table)
    allocation = report["allocation"]
    if allocation.get("note"):
        console().print(f"Allocation: {allocation['note']}", markup=False)


def _show_worst(rows: list[Json], count: int = 5) -> None:
    members = [member for row in rows for member in row["members"] if member["relative_error"] is not None]
    worst = sorted(members, key=lambda member: -member["relative_error"])[:count]
    if worst:
        table = make_table("layer", "error", left=["layer"])
        for member in worst:
            table.add_row(member["name"], _error(member["relative_error"]))
        print_table("\nWorst layers (relative error of the outputs on the calibration text)", table)


def _show_protocol(evaluation: Json) -> None:
    measured = evaluation["compressed"]
    perplexity, choices = measured["perplexity"], measured["choices"]
    questions = f"; {choices['n_questions']} questions" if choices is not None else ""
    what = f"{perplexity['n_tokens']} tokens in windows of {perplexity['window']}, in {measured['dtype']}{questions}"
    console().print(f"Text: {evaluation['text']}; {what}.", style="dim", markup=False)
    console().print(f"Perplexity, {evaluation['definition']}.", style="dim", markup=False)


def _show_samples(evaluation: Json) -> None:
    screen, note = console(), evaluation["compressed"].get("note")
    if note is not None:
        screen.print(f"\n{note[0].upper()}{note[1:]}.", markup=False)
        return
    screen.print(f"\nContinuing {evaluation['prompt']!r}:", markup=False)
    for label, one in (("before", evaluation["baseline"]), ("after", evaluation["compressed"])):
        if one is not None and one["sample"] is not None:
            screen.print(f"  {label:>6}: {printable(' '.join(one['sample'].split()))}", markup=False)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
