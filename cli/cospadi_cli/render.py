"""Tables and JSON on standard output."""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120
"""Columns when the output is no terminal, where rich would assume 80."""


def console(stderr: bool = False) -> Console:
    """Give a console on the current standard output or standard error."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH)


def print_json(data: Any) -> None:
    """Print strict JSON, and nothing else, on standard output."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))


def quieten_libraries() -> None:
    """Keep the loading bars and remarks of transformers and the hub out of our output; our own warnings stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def working(label: str, quiet: bool = False) -> Iterator[None]:
    """Show that something takes a while."""
    screen = console(stderr=True)
    if quiet:
        yield
    elif screen.is_terminal:
        with screen.status(label):
            yield
    else:
        screen.print(label, style=None, markup=False)
        yield


def size(n_bytes: float) -> str:
    """Phrase a number of bytes; 1 MB is 10^6 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000 or unit == "GB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"
        n_bytes /= 1000
    raise AssertionError("unreachable")


def show_report(report: dict[str, Any], out: Path) -> None:
    """Show the outcome of a compression: sizes, perplexities, worst layers, samples and how to load it."""
    screen, totals, evaluation = console(), report["totals"], report["evaluation"]
    table = _table("", "before", "after", "change")
    for label, key in (("compressed layers", "layer"), ("whole model", "model")):
        before, after = totals[f"{key}_dense_bytes"], totals[f"{key}_bytes"]
        table.add_row(label, size(before), size(after), f"-{1 - after / before:.1%}" if after <= before else "grew")
        if key == "layer":
            paper = f"-{totals['ratio_paper_convention']:.1%}"
            table.add_row("  by the paper's count", "", "", paper, style="dim")
    if evaluation is not None:
        _add_measurements(table, evaluation)
    _print(screen, f"{report['model']} -> {out}", table)
    screen.print("The paper's count (arXiv 2509.22075) leaves the mask out.", style="dim")
    if evaluation is not None:
        _show_protocol(screen, evaluation)
    _show_storage(screen, report)
    _show_worst(screen, report["groups"])
    if evaluation is None:
        screen.print("Not evaluated: switched off, or not a causal language model.")
    else:
        _show_samples(screen, evaluation)
    screen.print(f"\nThe model is in {out}. To use it:", markup=False)
    screen.print(f'  python -c "import cospadi; model = cospadi.load({str(out)!r})"', markup=False, soft_wrap=True)
    screen.print(f"  cospadi-cli generate {out} --prompt 'Once upon a time'", markup=False, soft_wrap=True)


def show_measurements(path: str, evaluation: dict[str, Any]) -> None:
    """Show what ``eval`` found, beside the baseline if there is one."""
    screen = console()
    columns = ("baseline", "model", "change") if evaluation["baseline"] else ("value",)
    table = _table("", *columns)
    _add_measurements(table, evaluation)
    _print(screen, path, table)
    _show_protocol(screen, evaluation)


def show_inspection(path: str, inspection: dict[str, Any]) -> None:
    """Show the groups of a checkpoint."""
    screen, rows, totals = console(), inspection["groups"], inspection["totals"]
    names = ("layer", "in", "out", "stored as", "atoms", "non-zero", "error", "bytes", "removed")
    table = _table(*names)
    for row in rows:
        removed = f"{1 - row['bytes'] / row['dense_bytes']:.1%}"
        sizes = ["-" if row[key] is None else str(row[key]) for key in ("n_atoms", "n_nonzero")]
        shape = (str(row["in_features"]), "", stored_as(row), *sizes)
        if len(row["members"]) == 1:
            shape = (shape[0], str(row["members"][0]["out_features"]), *shape[2:])
        table.add_row(row["name"], *shape, _error(row["relative_error"]), size(row["bytes"]), removed)
        for member in row["members"] if len(row["members"]) > 1 else ():
            cells = (
                "",
                str(member["out_features"]),
                "",
                "",
                "",
                _error(member["relative_error"]),
                size(member["bytes"]),
                "",
            )
            table.add_row(f"  {member['name']}", *cells, style="dim")
    _print(screen, path, table)
    before, after = totals["layer_dense_bytes"], totals["layer_bytes"]
    screen.print(
        f"{totals['n_layers']} layers in {totals['n_groups']} groups: {size(after)} of {size(before)} "
        f"({1 - after / before:.1%} removed)"
    )
    _show_worst(screen, rows)


def show_availability(title: str, rows: list[dict[str, Any]]) -> None:
    """Show the members of a registry and whether each can run here."""
    screen = console()
    table = _table("name", "here", "description", right=False)
    for row in rows:
        here = Text("yes", style="green") if row["available"] else Text("no", style="red")
        text = row["description"] if row["available"] else f"{row['description']} Not here: {row['reason']}"
        table.add_row(row["name"], here, Text(text))
    _print(screen, title, table)


def _table(*columns: str, right: bool = True) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if right and index else "left", overflow="fold")
    return table


def _print(screen: Console, title: str, table: Table) -> None:
    """Print a table under its title, which as a part of it would wrap at the table's width."""
    screen.print(Text(title, style="bold"))
    screen.print(table)


def _add_measurements(table: Table, evaluation: dict[str, Any]) -> None:
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


def stored_as(row: dict[str, Any]) -> str:
    """Say in a few words how a group is stored."""
    if row["kind"] == "quantized":
        return str(row["dictionary_dtype"])
    if row["kind"] == "sparse":
        return f"sparse {row['value_dtype']}"
    return f"factors {row['value_dtype']}{' of W^T' if row['side'] == 'output' else ''}"


def _show_storage(screen: Console, report: dict[str, Any]) -> None:
    """Show how the layers of each kind are stored, and what the allocation says of itself."""
    table = _table("stored as", "layers", "bytes", "of dense")
    rows: dict[str, list[float]] = {}
    for row in report["groups"]:
        sums = rows.setdefault(stored_as(row), [0, 0, 0])
        for place, value in enumerate((len(row["members"]), row["bytes"], row["dense_bytes"])):
            sums[place] += value
    dense = [2 * layer["in_features"] * layer["out_features"] for layer in report["kept_dense"]]
    if dense:
        rows["dense, as before"] = [len(dense), sum(dense), sum(dense)]
    for label, (count, after, before) in sorted(rows.items()):
        table.add_row(label, str(count), size(after), f"{after / before:.1%}")
    _print(screen, "\nHow the layers are stored", table)
    allocation = report["allocation"]
    if allocation.get("note"):
        screen.print(f"Allocation: {allocation['note']}", markup=False)


def _show_worst(screen: Console, rows: list[dict[str, Any]], count: int = 5) -> None:
    members = [member for row in rows for member in row["members"] if member["relative_error"] is not None]
    worst = sorted(members, key=lambda member: -member["relative_error"])[:count]
    if worst:
        table = _table("layer", "error")
        for member in worst:
            table.add_row(member["name"], _error(member["relative_error"]))
        _print(screen, "\nWorst layers (relative error of the outputs on the calibration text)", table)


def _show_protocol(screen: Console, evaluation: dict[str, Any]) -> None:
    measured = evaluation["compressed"]
    perplexity, choices = measured["perplexity"], measured["choices"]
    questions = f"; {choices['n_questions']} questions" if choices is not None else ""
    what = f"{perplexity['n_tokens']} tokens in windows of {perplexity['window']}, in {measured['dtype']}{questions}"
    screen.print(f"Text: {evaluation['text']}; {what}.", style="dim", markup=False)
    screen.print(f"Perplexity, {evaluation['definition']}.", style="dim", markup=False)


def _show_samples(screen: Console, evaluation: dict[str, Any]) -> None:
    note = evaluation["compressed"].get("note")
    if note is not None:
        screen.print(f"\n{note[0].upper()}{note[1:]}.", markup=False)
        return
    screen.print(f"\nContinuing {evaluation['prompt']!r}:", markup=False)
    for label, one in (("before", evaluation["baseline"]), ("after", evaluation["compressed"])):
        if one is not None and one["sample"] is not None:
            # A damaged model may write control characters, which a terminal would obey.
            sample = "".join(c if c.isprintable() else "?" for c in " ".join(one["sample"].split()))
            screen.print(f"  {label:>6}: {sample}", markup=False)


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
