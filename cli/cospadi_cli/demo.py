"""``demo``: the main job on the embedded model and text, with nothing to fetch or choose."""

from pathlib import Path

import click

from cospadi_cli.compress import Run, execute, output_options
from cospadi_cli.options import recipe_from, recipe_options


@click.command()
@click.option(
    "-o", "--out", type=Path, default=Path("cospadi-demo"), show_default=True, help="New folder for the result."
)
@recipe_options("samples")
@output_options
@click.pass_obj
def demo(
    typed: str, out: Path, calibration_samples: int | None, resume: bool, cache: Path | None, as_json: bool, quiet: bool
) -> None:
    """Remove 20 % of the embedded SmolLM2-135M-Instruct and measure what that costs.

    By dictionaries and sparse coefficients alone: at this size the default recipe of `compress` would rather store some
    layers in 8 bits.  Every byte of the compressed layers counts; the perplexity is that of a held-out public-domain
    text.
    """
    config = recipe_from({"calibration_samples": calibration_samples, "storage": "factors", "value_dtype": "bfloat16"})
    execute(Run(config, None, out, resume, None, 4096, as_json, quiet, cache, typed))
