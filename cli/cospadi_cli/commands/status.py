"""``status``: what a run has done and what is left."""

from datetime import datetime
from pathlib import Path

import click
from rich.text import Text

from cospadi_cli.console import console, make_table, print_json, print_table, printable, size
from cospadi_cli.run_folders import read_folder
from cospadi_cli.run_state import CacheState, FinishedRun, RunState

_SHOWN = 5
"""Most names that a list shows."""


@click.command()
@click.argument("path", metavar="WORKDIR", type=Path)
@click.option("--verify", is_flag=True, help="Read every record and compare its checksum; else sizes and headers.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(path: Path, verify: bool, as_json: bool) -> None:
    """Show what a run has done and what is left, while it is running or after it was interrupted.

    WORKDIR is the output folder of the run or the work folder in it.  For a --cache folder, its contents are shown.
    """
    found = read_folder(path, verify)
    if as_json:
        print_json(found.to_dict())
    elif isinstance(found, CacheState):
        _show_cache(found)
    elif isinstance(found, FinishedRun):
        _print(f"{found.path}: finished")
        for name, seconds in found.seconds.items():
            _print(f"  {name}: {seconds:.1f} s")
    else:
        _show_run(found)


def _show_run(run: RunState) -> None:
    state = run.state
    if run.process is not None and run.process["pid"]:
        state = f"running (pid {run.process['pid']} on host {run.process['host']})"
    console().print(Text(f"{run.path}: {state}", style="bold"))
    recipe = "unknown" if run.recipe is None else ", ".join(f"{key} {value}" for key, value in run.recipe.items())
    for label, value in (("model", run.model), ("recipe", recipe), ("threads", run.threads)):
        if value is not None:
            _print(f"{label}: {value}")
    columns = ("stage", "done", "of", "", "seconds")
    table = make_table(*columns, left=("stage", ""))
    for stage in run.stages:
        total = "?" if stage.total is None else str(stage.total)
        seconds = "" if stage.seconds is None else f"{stage.seconds:.1f}"
        table.add_row(stage.name, str(stage.done), total, stage.of, seconds)
    console().print(table)
    for stage in run.stages:
        _print_names(f"not done in {stage.name}", stage.left)
    _print(f"records: {size(run.files.bytes)}; last activity: {_when(run.files.last_activity)}")
    _print_names("damaged, will be made again", run.files.damaged)
    if run.command is not None and run.process is None:
        _print(f"to continue: {run.command}")


def _show_cache(cache: CacheState) -> None:
    columns = ("folder", "inputs", "texts", "bytes", "last activity", "damaged")
    table = make_table(*columns, left=("folder", "last activity"))
    for kept in cache.measurements:
        files = kept.files
        counts = (str(kept.inputs), str(kept.texts), size(files.bytes))
        table.add_row(kept.folder, *counts, _when(files.last_activity), str(len(files.damaged)))
    print_table(f"{cache.path}: measurements for --cache", table)
    for kept in cache.measurements:
        _print_names(f"damaged in {kept.folder}", kept.files.damaged)


def _print_names(label: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        _print(f"{label}: {', '.join(names[:_SHOWN])}{more}")


def _print(line: str) -> None:
    console().print(printable(line), markup=False, soft_wrap=True)


def _when(moment: float | None) -> str:
    return "never" if moment is None else datetime.fromtimestamp(moment).astimezone().isoformat(" ", "seconds")
