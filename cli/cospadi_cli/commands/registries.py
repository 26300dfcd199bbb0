"""``solvers``, ``backends`` and ``formats``: what is installed, and what can run here."""

import importlib
import inspect
from typing import Any

import click
from rich.text import Text

from cospadi_cli.console import make_table, print_json, print_table


def _registry_commands(plural: str, kind: str) -> click.Group:
    """Make the group of commands of the registry that the room ``cospadi.<plural>`` shows."""

    @click.group(plural, help=f"List the {plural}.", short_help=f"The {plural} that can be chosen by name.")
    def group() -> None:
        pass

    @group.command("list", help=f"List every {kind}, whether it can run on this machine, and if not, why.")
    @click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
    def list_members(as_json: bool) -> None:
        rows = _rows(getattr(importlib.import_module(f"cospadi.{plural}"), plural.upper()))
        if as_json:
            print_json(rows)
        else:
            _show(plural, rows)

    return group


def _rows(registry: Any) -> list[dict[str, Any]]:
    rows = []
    for name in registry.names():
        state = registry.availability(name)
        description = (inspect.getdoc(registry.get(name)) or "").partition("\n\n")[0]
        text = " ".join(description.replace("`", "").split())
        rows.append({"name": name, "available": state.ok, "reason": state.reason, "description": text})
    return rows


def _show(title: str, rows: list[dict[str, Any]]) -> None:
    columns = ("name", "here", "description")
    table = make_table(*columns, left=columns)
    for row in rows:
        here = Text("yes", style="green") if row["available"] else Text("no", style="red")
        text = row["description"] if row["available"] else f"{row['description']} Not here: {row['reason']}"
        table.add_row(row["name"], here, Text(text))
    print_table(title, table)


solvers = _registry_commands("solvers", "solver")
backends = _registry_commands("backends", "backend")
formats = _registry_commands("formats", "format")
