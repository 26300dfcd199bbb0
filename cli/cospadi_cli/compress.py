"""``compress``: a model becomes a checkpoint folder, measured before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cospadi_cli import render
from cospadi_cli.options import recipe_from, recipe_options

if TYPE_CHECKING:
    from cospadi.config import CompressionConfig

PROMPT = "The President of the United States said that"


@dataclass(frozen=True)
class Run:
    """One compression with its closing evaluation, as the command line was asked for it."""

    config: "CompressionConfig"
    model: str | None
    out: Path
    resume: bool
    eval_text: str | None
    eval_tokens: int
    as_json: bool
    quiet: bool
    cache: Path | None
    typed: str
    """The command line, to be repeated with --resume."""


def output_options(command: Any) -> Any:
    """Add what ``compress`` and ``demo`` have in common besides the recipe."""
    for option in (
        click.option("--quiet", is_flag=True, help="No progress and no tables."),
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
    resume: bool,
    cache: Path | None,
    eval_text: str | None,
    eval_tokens: int,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Compress MODEL, a folder or hub id; without it the embedded SmolLM2-135M-Instruct.

    Writes a folder that `cospadi.load` reads, with report.json and a model card, and compares both models on a text.
    An interrupted run goes on with --resume.
    """
    config = recipe_from(values)
    name = Path(model).resolve().name if model else "SmolLM2-135M-Instruct"
    out = out or Path(f"cospadi-{name}-{config.ratio:g}")
    execute(Run(config, model, out, resume, eval_text, eval_tokens, as_json, quiet, cache, typed))


def execute(run: Run) -> None:
    """Compress, evaluate, write the report and the card, and show them.

    Whatever can be checked is checked before anything is loaded.

    Raises
    ------
    CospadiError
        As of ``cospadi.pipeline.compress``.
    """
    from cospadi.calibration.data import EMBEDDED_EVALUATION, read_text
    from cospadi.pipeline import choose_method, write_report
    from cospadi.pipeline import compress as compress_model
    from cospadi.work import WORK, check_output
    from cospadi_cli import measuring

    choose_method(run.config)
    measuring.check_backend(run.config.backend)
    check_output(run.out, run.resume)
    read_text(run.config.calibration.text)
    text = read_text(run.eval_text, EMBEDDED_EVALUATION) if run.eval_tokens else ""
    render.quieten_libraries()
    model = run.model or _embedded(run.quiet)
    window = run.config.calibration.seq_len
    name = run.eval_text or "the public-domain evaluation text of the package"
    protocol = measuring.protocol(model, name, text, run.eval_tokens, window, PROMPT) if run.eval_tokens else None
    try:
        with render.progress(run.quiet) as listener:
            report = compress_model(model, run.out, run.config, cache=run.cache, resume=run.resume, on_event=listener)
        if protocol is not None:
            report["evaluation"] = measuring.compare_folders(model, run.out, protocol, run.config, run.quiet)
            write_report(run.out, report)
    except KeyboardInterrupt:
        if (run.out / WORK).is_dir():
            again = run.typed if run.resume else f"{run.typed} --resume"
            click.echo(f"\nWhat is finished is kept. To go on: {again}", err=True)
        raise
    if run.as_json:
        render.print_json(report)
    elif not run.quiet:
        render.show_report(report, run.out)


def _embedded(quiet: bool) -> str:
    from cospadi.embedded import embedded_model

    with render.working("preparing the embedded model", quiet):
        return str(embedded_model())
