"""``inspect``: what a checkpoint holds, group by group."""

from pathlib import Path
from typing import Any

import click

from cospadi_cli import render


@click.command()
@click.argument("path", type=Path)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def inspect(path: Path, as_json: bool) -> None:
    """Show the groups of the checkpoint at PATH: sizes, bytes, errors and the worst layers."""
    inspection = _inspect(path)
    if as_json:
        render.print_json({"path": str(path), **inspection})
    else:
        render.show_inspection(str(path), inspection)


def _inspect(path: Path) -> dict[str, Any]:
    """Give the rows of report.json, or without one those that config.json alone can give: sizes but no errors."""
    from cospadi.errors import CheckpointError
    from cospadi.formats.checkpoint import CheckpointConfig
    from cospadi.formats.verify import read_json
    from cospadi.loading import require_checkpoint

    require_checkpoint(path)
    settings = CheckpointConfig.from_dict(read_json(path, "config.json")["quantization_config"])
    report = path / "report.json"
    if not report.is_file():
        return _from_config(settings)
    data = read_json(path, "report.json")
    try:
        return {"groups": data["groups"], "totals": data["totals"], "evaluation": data["evaluation"]}
    except KeyError as error:
        raise CheckpointError(f"{report} is damaged: delete it to see what config.json alone says") from error


def _from_config(settings: Any) -> dict[str, Any]:
    from math import prod

    from cospadi.formats.checkpoint import expected_tensors

    rows = []
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
        row = {"name": group.name, "members": members, "in_features": group.in_features}
        columns = group.in_features if group.side == "output" else outputs
        n_nonzero = round(sum(member.n_stored for member in group.members) / columns)
        plain = group.format == "identity"
        row |= {"n_atoms": None if plain else group.n_atoms, "n_nonzero": None if plain else n_nonzero}
        kind = (
            "quantized" if group.format == "identity" else "sparse" if group.dictionary_dtype == "none" else "factors"
        )
        row |= {"kind": kind, "side": group.side}
        row |= {"value_dtype": group.value_dtype, "dictionary_dtype": group.dictionary_dtype}
        row |= {"relative_error": None, "bytes": sum(tensors.values()), "dense_bytes": 2 * group.in_features * outputs}
        rows.append(row)
    totals = {"n_layers": sum(len(row["members"]) for row in rows), "n_groups": len(rows)}
    totals |= {"layer_bytes": sum(row["bytes"] for row in rows)}
    totals |= {"layer_dense_bytes": sum(row["dense_bytes"] for row in rows)}
    return {"groups": rows, "totals": totals, "evaluation": None}
