"""``status``: what a run has done and what is left."""

from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from cospadi_cli import render
from cospadi_cli.state import read_status

_SHOWN = 5
"""Names that a list of them begins with."""


@click.command()
@click.argument("path", metavar="WORKDIR", type=Path)
@click.option("--verify", is_flag=True, help="Read every record and compare its checksum; else sizes and headers.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(path: Path, verify: bool, as_json: bool) -> None:
    """Show what a run has done and what is left, while it goes on or after it was interrupted.

    WORKDIR is the output folder of the run or the work folder in it; of a --cache folder it shows what it keeps.
    """
    found = read_status(path, verify)
    if as_json:
        render.print_json(found)
    elif found["state"] == "cache":
        _show_cache(found)
    else:
        _show_run(found)


def _show_run(found: dict[str, Any]) -> None:
    screen = render.console()
    if found["state"] == "finished":
        screen.print(f"{found['path']}: finished", markup=False)
        for name, seconds in found["seconds"].items():
            screen.print(f"  {name}: {seconds:.1f} s", markup=False)
        return
    state, process = found["state"], found["process"]
    if process is not None:
        state = f"running (pid {process['pid']} on host {process['host']})" if process["pid"] else "running"
    screen.print(Text(f"{found['path']}: {state}", style="bold"))
    recipe = "unknown" if found["recipe"] is None else ", ".join(f"{k} {v}" for k, v in found["recipe"].items())
    for label, value in (("model", found["model"]), ("recipe", recipe), ("threads", found["threads"])):
        if value is not None:
            screen.print(_plain(f"{label}: {value}"), markup=False)
    table = _table("stage", "done", "of", "", "seconds")
    for stage in found["stages"]:
        total = "?" if stage["total"] is None else str(stage["total"])
        seconds = "" if stage["seconds"] is None else f"{stage['seconds']:.1f}"
        table.add_row(stage["name"], str(stage["done"]), total, stage["of"], seconds)
    screen.print(table)
    for stage in found["stages"]:
        _show_names(f"left of {stage['name']}", stage["left"])
    _show_files(found)
    if found["command"] is not None and found["state"] == "interrupted":
        screen.print(_plain(f"to go on: {found['command']}"), markup=False, soft_wrap=True)


def _show_cache(found: dict[str, Any]) -> None:
    screen = render.console()
    screen.print(Text(f"{found['path']}: measurements for --cache", style="bold"))
    table = _table("folder", "inputs", "texts", "bytes", "last activity", "damaged")
    for kept in found["measurements"]:
        counts = (str(kept["inputs"]), str(kept["texts"]), render.size(kept["bytes"]), _when(kept["last_activity"]))
        table.add_row(kept["folder"], *counts, str(len(kept["damaged"])))
    screen.print(table)
    for kept in found["measurements"]:
        _show_names(f"damaged in {kept['folder']}", kept["damaged"])


def _show_files(found: dict[str, Any]) -> None:
    screen = render.console()
    screen.print(f"records: {render.size(found['bytes'])}; last activity: {_when(found['last_activity'])}")
    _show_names("damaged, to be made again", found["damaged"])


def _show_names(label: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        text = f"{label}: {', '.join(names[:_SHOWN])}{more}"
        render.console().print(_plain(text), markup=False, soft_wrap=True)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2))
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _when(moment: float | None) -> str:
    return "never" if moment is None else datetime.fromtimestamp(moment).astimezone().isoformat(" ", "seconds")


def _plain(text: str) -> str:
    """Replace control characters, which a terminal would obey: names may come from a hostile model."""
    return "".join(c if c.isprintable() else "?" for c in text)
