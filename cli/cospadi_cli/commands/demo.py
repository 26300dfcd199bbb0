"""``demo``: the embedded model compressed and measured, with nothing to download or choose."""

from pathlib import Path
from typing import Any

import click

from cospadi_cli.compression_run import CompressionRun, RunOptions, run_options
from cospadi_cli.options import execution_from, execution_options, recipe_from, recipe_options


@click.command()
@click.option(
    "-o", "--out", type=Path, default=Path("cospadi-demo"), show_default=True, help="New folder for the result."
)
@recipe_options("samples")
@execution_options
@run_options
@click.pass_obj
def demo(typed: str, /, out: Path, calibration_samples: int | None, **values: Any) -> None:
    """Remove 20 % of the embedded SmolLM2-135M-Instruct and measure the loss of quality.

    All layers become dictionaries and sparse coefficients; at this ratio the default recipe of `compress` would store
    some layers in 8 bits.  Every byte of the compressed layers counts.  The perplexity is that of a held-out
    public-domain text.
    """
    config = recipe_from({"calibration_samples": calibration_samples, "storage": "factors", "value_dtype": "bfloat16"})
    execution = execution_from(values)
    CompressionRun(typed, config, None, out, execution, RunOptions(**values)).execute()
