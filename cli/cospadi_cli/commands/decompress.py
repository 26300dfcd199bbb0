"""``decompress``: a checkpoint becomes an ordinary dense model folder."""

from pathlib import Path

import click

from cospadi_cli.console import quieten_libraries, working


@click.command()
@click.argument("path", type=Path)
@click.option("-o", "--out", type=Path, required=True, help="New folder for the dense model.")
def decompress(path: Path, out: Path) -> None:
    """Multiply out the checkpoint at PATH into a dense model that any tool reads.

    The result computes the same function at the size of the original: for tools that cannot import cospadi.
    """
    from cospadi.integrations import decompress as multiply_out
    from cospadi.integrations import require_checkpoint

    require_checkpoint(path)
    quieten_libraries()
    with working(f"multiplying out {path}"):
        multiply_out(path, out)
    click.echo(f"The dense model is in {out}.")
