"""``compress``: a model becomes a checkpoint folder, measured before and after."""

from pathlib import Path
from typing import Any

import click

from cospadi_cli.compression_run import CompressionRun, RunOptions, run_options
from cospadi_cli.options import execution_from, execution_options, recipe_from, recipe_options


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
@run_options
@click.pass_obj
def compress(
    typed: str,
    /,
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
    --resume continues an interrupted run; Ctrl-C and SIGTERM keep the groups that are finished.
    """
    execution, config = execution_from(values), recipe_from(values)
    name = Path(model).resolve().name if model else "SmolLM2-135M-Instruct"
    out = out or Path(f"cospadi-{name}-{config.ratio:g}")
    options = RunOptions(cache, resume, as_json, quiet, log_file, events)
    CompressionRun(typed, config, model, out, execution, options, eval_text, eval_tokens).execute()
