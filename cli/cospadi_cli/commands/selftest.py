"""``selftest``: a check of every backend on this machine."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from cospadi_cli.console import print_json

if TYPE_CHECKING:
    from cospadi.backends.selftest import Check

_COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}


@click.command()
@click.option("--gpu", is_flag=True, help="Check on the NVIDIA GPU, which takes minutes; by default on the CPU.")
@click.option("--json", "as_json", is_flag=True, help="Print the checks as JSON.")
def selftest(gpu: bool, as_json: bool) -> int:
    """Compare the products of every backend on this machine with float64.

    With --gpu also check CUDA graphs, streams, memory and K-SVD on cupy, which the tests of the package cannot run
    without a GPU.  The exit code is 1 if a check failed.  A check that cannot run here is listed as skipped, with the
    reason.
    """
    from cospadi.backends.selftest import checks, machine

    where = machine(gpu)
    found = []
    for check in checks(gpu):
        found.append(check)
        click.echo(f"{check.check}, {check.subject}: {check.verdict}", err=True)
    failed = sum(check.verdict == "failed" for check in found)
    if as_json:
        print_json({**where, "failed": failed, "checks": [asdict(check) for check in found]})
    else:
        _show(where, found)
    return 1 if failed else 0


def _show(machine: dict[str, str | None], checks: "list[Check]") -> None:
    """Print a table of the checks and the number of each verdict."""
    cuda = f", CUDA {machine['cuda']}" if machine["cuda"] else ""
    click.echo(f"{machine['device']}, torch {machine['torch']}{cuda}")
    click.secho(f"{'check':<24}{'of':<14}{'cases':>6}{'worst':>10}{'allowed':>10}  verdict", bold=True)
    for one in checks:
        line = (
            f"{one.check:<24}{one.subject:<14}{one.cases or '-':>6}{_error(one.worst):>10}{_error(one.allowed):>10}  "
        )
        click.echo(line + click.style(one.verdict, fg=_COLOURS[one.verdict]))
        if one.detail:
            click.echo(f"    {one.detail}")
    counts = [f"{sum(one.verdict == verdict for one in checks)} {verdict}" for verdict in _COLOURS]
    click.echo(", ".join(counts))


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
