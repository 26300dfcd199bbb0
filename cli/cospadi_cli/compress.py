"""``compress``: a model becomes a checkpoint folder, measured before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cospadi.errors import CospadiError, UsageError
from cospadi.events import Evaluated, Listener, Stopped
from cospadi.recipe import Execution
from cospadi_cli import render
from cospadi_cli.options import execution_from, execution_options, recipe_from, recipe_options
from cospadi_cli.progress import progress
from cospadi_cli.stopping import Terminated, stoppable

if TYPE_CHECKING:
    from cospadi.evaluation import Protocol
    from cospadi.recipe import CompressionConfig
    from cospadi.reporting import Report

PROMPT = "The President of the United States said that"


@dataclass(frozen=True)
class Run:
    """One compression with its closing evaluation, as the command line was asked for it.

    Attributes
    ----------
    typed : str
        The command line, to be repeated with --resume.
    """

    config: "CompressionConfig"
    model: str | None
    out: Path
    eval_text: str | None
    eval_tokens: int
    typed: str
    execution: Execution
    cache: Path | None
    resume: bool
    as_json: bool
    quiet: bool
    log_file: Path | None
    events: str | None


def output_options(command: Any) -> Any:
    """Add what ``compress`` and ``demo`` have in common besides the recipe."""
    for option in (
        click.option(
            "--events",
            metavar="FILE",
            help="Append what happens to FILE, one JSON object a line (see docs/sdk.md); - writes it on standard "
            "output, in place of the tables.",
        ),
        click.option("--log-file", type=Path, metavar="FILE", help="Append the progress to FILE, with times in UTC."),
        click.option("--quiet", is_flag=True, help="No progress and no tables, only errors."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON on standard output."),
        click.option("--resume", is_flag=True, help="Continue the interrupted run that OUT holds, if there is one."),
        click.option(
            "--cache",
            type=Path,
            help="Folder that keeps calibration and profile: another ratio of the model then costs only the solving.",
        ),
    ):
        command = option(command)
    return command


@click.command()
@click.argument("model", required=False)
@click.option("-o", "--out", type=Path, help="New folder for the result.  [default: cospadi-MODEL-RATIO]")
@recipe_options()
@execution_options
@click.option("--eval-text", metavar="FILE|hf:NAME", help="Text of the closing evaluation; default: the package's own.")
@click.option(
    "--eval-tokens",
    type=click.IntRange(min=0),
    default=4096,
    show_default=True,
    help="Tokens of the closing evaluation of both models, in windows of --seq-len; 0 for none.",
)
@output_options
@click.pass_obj
def compress(
    typed: str,
    model: str | None,
    out: Path | None,
    eval_text: str | None,
    eval_tokens: int,
    cache: Path | None,
    resume: bool,
    as_json: bool,
    quiet: bool,
    log_file: Path | None,
    events: str | None,
    **values: Any,
) -> None:
    """Compress MODEL, a folder or hub id; without it the embedded SmolLM2-135M-Instruct.

    Writes a folder that `cospadi.load` reads, with report.json and a model card, and compares both models on a text.
    An interrupted run goes on with --resume; Ctrl-C and SIGTERM keep what is finished.
    """
    execution = execution_from(values)
    config = recipe_from(values)
    name = Path(model).resolve().name if model else "SmolLM2-135M-Instruct"
    out = out or Path(f"cospadi-{name}-{config.ratio:g}")
    execute(
        Run(
            config,
            model,
            out,
            eval_text,
            eval_tokens,
            typed,
            execution,
            cache,
            resume,
            as_json,
            quiet,
            log_file,
            events,
        )
    )


def execute(run: Run) -> None:
    """Compress, evaluate, write the report and the card, and show them.

    Whatever can be checked is checked before anything is loaded.

    Raises
    ------
    CospadiError
        As of ``cospadi.pipeline.stages.compress``.
    """
    if run.as_json and run.events == "-":
        raise UsageError("--json and --events - both want standard output: write the events to a file")
    try:
        with stoppable():
            report = _work(run)
    except KeyboardInterrupt as stop:
        again = _again(run)
        if again is not None:
            click.echo(f"\nWhat is finished is kept. To go on: {again}", err=True)
        if not isinstance(stop, Terminated):
            raise
        click.echo("Error: terminated", err=True)
        raise click.exceptions.Exit(143) from stop
    if run.as_json:
        render.print_json(report)
    elif not run.quiet and run.events != "-":
        render.show_report(report, run.out)


def _work(run: Run) -> "Report":
    from cospadi.calibration import EMBEDDED_EVALUATION, open_text
    from cospadi.pipeline import check_output, choose_method
    from cospadi.pipeline import compress as compress_model
    from cospadi.reporting import write_report
    from cospadi_cli import measuring

    choose_method(run.config)
    measuring.check_backend(run.config.backend)
    check_output(run.out, run.resume)
    next(open_text(run.config.calibration.text), "")
    text = open_text(run.eval_text, EMBEDDED_EVALUATION) if run.eval_tokens else ""
    render.quieten_libraries()
    model = run.model or _embedded(run.quiet)
    window = run.config.calibration.seq_len
    name = run.eval_text or "the public-domain evaluation text of the package"
    protocol = measuring.protocol(model, name, text, run.eval_tokens, window, PROMPT) if run.eval_tokens else None
    with progress(run.quiet, run.log_file, run.events) as tell:
        try:
            report = compress_model(
                model,
                run.out,
                run.config,
                cache=run.cache,
                resume=run.resume,
                execution=run.execution,
                command=run.typed,
                on_event=tell,
            )
            if protocol is not None and report["evaluation"] is None:
                report["evaluation"] = _evaluate(run, model, protocol, tell)
                write_report(run.out, report)
        except KeyboardInterrupt as stop:
            tell(Stopped("terminated" if isinstance(stop, Terminated) else "interrupted", _again(run)))
            raise
        except (CospadiError, OSError) as error:
            tell(Stopped(str(error), _again(run)))
            raise
    return report


def _evaluate(run: Run, model: str, protocol: "Protocol", tell: Listener) -> dict[str, Any]:
    """Measure the dense and the compressed model."""
    from cospadi.evaluation import compare, measure_folders

    def progress(done: float, total: int) -> None:
        tell(Evaluated(int(done), total, work_done=done))

    config = run.config
    found = measure_folders((model, run.out), protocol, config.backend, config.device, run.execution, progress)
    return compare(found[0], found[1], protocol)


def _again(run: Run) -> str | None:
    """Give the command that goes on; None where nothing was begun or all is finished."""
    from cospadi.pipeline import WORK

    if not (run.out / WORK).is_dir():
        return None
    return run.typed if run.resume else f"{run.typed} --resume"


def _embedded(quiet: bool) -> str:
    from cospadi.models import embedded_model

    with render.working("preparing the embedded model", quiet):
        return str(embedded_model())
