"""``tune``: measure and store the numbers of tokens from which dense products are faster here."""

from dataclasses import asdict

import click

from cospadi_cli.console import print_json
from cospadi_cli.speed_tables import show_crossovers, show_tuned
from cospadi_cli.torch_settings import DEVICE_HELP, speed_device, torch_threads


@click.command()
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of a CPU.  [default: torch's own]")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=100.0,
    show_default=True,
    help="Approximate length of the measurement.",
)
@click.option("--show", is_flag=True, help="Only show what is stored.")
@click.option("--reset", is_flag=True, help="Only remove what is stored.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("--quiet", is_flag=True, help="No progress.")
def tune(device: str, threads: int | None, seconds: float, show: bool, reset: bool, as_json: bool, quiet: bool) -> None:
    """Measure from how many tokens dense products are faster than kernels, for the choice of backend auto.

    The thresholds are stored in the cache folder.  They hold for the same processor or GPU, number of threads and
    versions of torch and cospadi; in all other cases the shipped thresholds are used.
    """
    from cospadi.backends import reset_tuned, store_tuned, stored_tuned

    if show and reset:
        raise click.UsageError("--show and --reset exclude each other")
    if reset:
        removed = reset_tuned()
        if as_json:
            print_json({"removed": removed})
        else:
            click.echo("Removed." if removed else "Nothing is stored.")
        return
    found = []
    if not show:
        from cospadi.evaluation.speed import measure_crossovers, tuned_thresholds

        place = speed_device(device)
        with torch_threads(threads):
            found = measure_crossovers(place, seconds, lambda text: None if quiet else click.echo(text, err=True))
            store_tuned(tuned_thresholds(place, found))
    entries = stored_tuned()
    if as_json:
        crossovers = [asdict(one) for one in found]
        print_json({"entries": [asdict(entry) for entry in entries], "measured": crossovers})
    else:
        show_crossovers(found)
        show_tuned(entries)
