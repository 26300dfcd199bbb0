"""``inspect``: the groups of a checkpoint."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cospadi_cli.console import print_json
from cospadi_cli.report_tables import show_inspection

if TYPE_CHECKING:
    from cospadi.formats import CheckpointConfig


@click.command()
@click.argument("path", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show the groups of the checkpoint at PATH: sizes, bytes, errors and the worst layers."""
    inspection = inspect_checkpoint(path)
    if as_json:
        print_json({"path": str(path), **inspection})
    elif not inspection["groups"]:
        click.echo(f"{path}: no layer is compressed")
    else:
        show_inspection(str(path), inspection)


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Give the rows of report.json; if there is none, those that follow from config.json: sizes but no errors.

    Raises
    ------
    CheckpointError
        A file is damaged, or report.json describes another checkpoint.
    UsageError
        The folder is not a compressed checkpoint.
    """
    from cospadi.errors import CheckpointError
    from cospadi.files import read_json
    from cospadi.formats import check_checksums, read_config
    from cospadi.integrations import require_checkpoint

    require_checkpoint(path)
    check_checksums(path, ["config.json"])
    described = _from_config(read_config(path))
    report = path / "report.json"
    if not report.is_file():
        return described
    data = read_json(path, "report.json")
    if not _fits(data, described):
        raise CheckpointError(
            f"{report} is damaged or describes another checkpoint: delete it to see what config.json says"
        )
    return {"groups": data["groups"], "totals": data["totals"], "evaluation": data["evaluation"]}


def _fits(report: dict[str, Any], described: dict[str, Any]) -> bool:
    """Tell whether a report has all that is shown, and describes the groups of config.json."""
    try:
        json.dumps(report, allow_nan=False)
    except ValueError:  # NaN or infinity
        return False
    rows, totals = report.get("groups"), report.get("totals")
    if "evaluation" not in report or not isinstance(totals, dict) or not isinstance(rows, list):
        return False
    if not all(_is_count(totals.get(key)) for key in ("n_layers", "n_groups", "layer_bytes", "layer_dense_bytes")):
        return False
    if not totals["layer_dense_bytes"]:
        return False
    expected = described["groups"]
    return len(rows) == len(expected) and all(_agrees(row, known) for row, known in zip(rows, expected, strict=True))


def _agrees(row: Any, known: Mapping[str, Any]) -> bool:
    if not isinstance(row, dict) or not set(known) <= set(row):
        return False
    for key, value in known.items():
        found = row[key]
        if key == "members":
            if not isinstance(found, list) or len(found) != len(value):
                return False
            if not all(_agrees(member, one) for member, one in zip(found, value, strict=True)):
                return False
        elif key == "relative_error":
            if type(found) not in (int, float) or not 0 <= found < 2**63:
                return False
        elif key == "n_nonzero" and value is not None:
            if not _is_count(found):
                return False
        elif type(found) is not type(value) or found != value:
            return False
    return True


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _from_config(settings: "CheckpointConfig") -> dict[str, Any]:
    from cospadi.formats import expected_tensors

    rows: list[dict[str, Any]] = []
    for group in settings.groups:
        tensors = {
            name: prod(shape) * dtypes[0].itemsize
            for name, (shape, dtypes) in expected_tensors(group).items()
            if not name.endswith(".bias")
        }
        members = [
            {
                "name": member.name,
                "out_features": member.out_features,
                "relative_error": None,
                "bytes": sum(n for name, n in tensors.items() if name.rpartition(".")[0] == member.name),
            }
            for member in group.members
        ]
        outputs = sum(member.out_features for member in group.members)
        columns = group.in_features if group.side == "output" else outputs
        n_nonzero = round(sum(member.n_stored for member in group.members) / columns)
        plain = group.format == "identity"
        rows.append(
            {
                "name": group.name,
                "members": members,
                "in_features": group.in_features,
                "n_atoms": None if plain else group.n_atoms,
                "n_nonzero": None if plain else n_nonzero,
                "kind": "quantized" if plain else "sparse" if group.dictionary_dtype == "none" else "factors",
                "side": None if plain else group.side,
                "value_dtype": group.dictionary_dtype if plain else group.value_dtype,
                "dictionary_dtype": group.dictionary_dtype,
                "relative_error": None,
                "bytes": sum(tensors.values()),
                "dense_bytes": 2 * group.in_features * outputs,
            }
        )
    totals = {
        "n_layers": sum(len(group.members) for group in settings.groups),
        "n_groups": len(rows),
        "layer_bytes": sum(row["bytes"] for row in rows),
        "layer_dense_bytes": sum(row["dense_bytes"] for row in rows),
    }
    return {"groups": rows, "totals": totals, "evaluation": None}
