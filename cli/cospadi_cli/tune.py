"""``tune``: measure from which number of tokens on dense products are better here, and remember it."""

from dataclasses import asdict

import click

from cospadi_cli import render, render_speed
from cospadi_cli.places import DEVICE_HELP, torch_device, torch_threads


@click.command()
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of a CPU.  [default: torch's own]")
@click.option(
    "--seconds", type=click.FloatRange(min=1), default=100.0, show_default=True, help="How long to measure, about."
)
@click.option("--show", is_flag=True, help="Only show what is stored.")
@click.option("--reset", is_flag=True, help="Only remove what is stored.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("--quiet", is_flag=True, help="No progress.")
def tune(device: str, threads: int | None, seconds: float, show: bool, reset: bool, as_json: bool, quiet: bool) -> None:
    """Measure this machine, so that backend auto changes from kernels to dense products where it should.

    What is found is kept in the cache folder and holds for the same processor or GPU, number of threads and versions of
    torch and cospadi; elsewhere the shipped thresholds are taken.
    """
    from cospadi.backends import reset_tuned, store_tuned, stored_tuned

    if show and reset:
        raise click.UsageError("--show and --reset exclude each other")
    if reset:
        removed = reset_tuned()
        if as_json:
            render.print_json({"removed": removed})
        else:
            click.echo("Removed." if removed else "Nothing is stored.")
        return
    found = []
    if not show:
        from cospadi.evaluation.speed import measure_crossovers, to_store

        place = torch_device(device)
        with torch_threads(threads):
            found = measure_crossovers(place, seconds, lambda text: None if quiet else click.echo(text, err=True))
            store_tuned(to_store(place, found))
    entries = stored_tuned()
    if as_json:
        crossovers = [asdict(one) for one in found]
        render.print_json({"entries": [asdict(entry) for entry in entries], "measured": crossovers})
    else:
        render_speed.show_crossovers(found)
        render_speed.show_tuned(entries)
