"""``demo``: the main job on the embedded model and text, with nothing to fetch or choose."""

from pathlib import Path
from typing import Any

import click

from cospadi_cli.compress import Run, execute, output_options
from cospadi_cli.options import execution_from, execution_options, recipe_from, recipe_options


@click.command()
@click.option(
    "-o", "--out", type=Path, default=Path("cospadi-demo"), show_default=True, help="New folder for the result."
)
@recipe_options("samples")
@execution_options
@output_options
@click.pass_obj
def demo(typed: str, out: Path, calibration_samples: int | None, **values: Any) -> None:
    """Remove 20 % of the embedded SmolLM2-135M-Instruct and measure what that costs.

    By dictionaries and sparse coefficients alone: at this size the default recipe of `compress` would rather store some
    layers in 8 bits.  Every byte of the compressed layers counts; the perplexity is that of a held-out public-domain
    text.
    """
    config = recipe_from({"calibration_samples": calibration_samples, "storage": "factors", "value_dtype": "bfloat16"})
    execute(Run(config, None, out, None, 4096, typed, execution_from(values), **values))
