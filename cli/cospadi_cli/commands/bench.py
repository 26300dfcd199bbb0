"""``bench``: the speed of single layers and whole models, beside dense ones."""

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cospadi_cli.console import print_json, quieten_libraries
from cospadi_cli.speed_tables import show_layers, show_model
from cospadi_cli.torch_settings import DEVICE_HELP, speed_device, torch_dtypes, torch_threads

if TYPE_CHECKING:
    from cospadi.evaluation.speed import LayerFigures, ModelFigures

_DTYPES = ("bfloat16", "float16", "float32")
_VALUE_DTYPES = ("bfloat16", "float16", "float32", "bfloat14", "int8")
_OF_LAYERS = ("shape", "shapes", "ratio", "tokens", "value_dtype", "plot")
_OF_MODELS = ("baseline", "prompt_tokens", "new_tokens", "memory")


class _Numbers(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """Whole numbers separated by commas, such as 1,8,512."""

    name = "N,N,..."

    def __init__(self, least: int, count: int = 0) -> None:
        self.least, self.count = least, count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: expected whole numbers separated by commas", param, ctx)
        if min(found) < self.least or (self.count and len(found) != self.count):
            wanted = f"{self.count} numbers" if self.count else "numbers"
            self.fail(f"{value!r}: expected {wanted} of at least {self.least}", param, ctx)
        return found


@click.command()
@click.argument("model", required=False)
@click.option("--shape", type=_Numbers(1, 2), multiple=True, metavar="IN,OUT", help="A layer. May be repeated.")
@click.option(
    "--shapes",
    type=click.Choice(("smollm2", "standard", "all")),
    help="A set of layers: those of SmolLM2-135M, or 2048x2048, 4096x4096 and 4096x11008.  [default: standard]",
)
@click.option(
    "--ratio", type=float, multiple=True, help="Fraction of the bytes to remove. May be repeated.  [default: 0.3]"
)
@click.option("--tokens", type=_Numbers(1), metavar="N,N,...", help="Numbers of tokens.  [default: 1,8,512]")
@click.option(
    "--dtype",
    type=click.Choice(_DTYPES),
    multiple=True,
    help="Dtype of the inputs and of the dense weights. May be repeated.  [default: bfloat16; with MODEL also float32]",
)
@click.option("--value-dtype", type=click.Choice(_VALUE_DTYPES), help="Dtype of the coefficients.  [default: bfloat16]")
@click.option(
    "--backend",
    multiple=True,
    help="Backend to measure. May be repeated.  [default: all that can run; with MODEL auto]",
)
@click.option("--baseline", metavar="PATH", help="Dense model beside MODEL.  [default: MODEL multiplied out]")
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Tokens of the prompt of MODEL.  [default: 512]")
@click.option("--new-tokens", type=click.IntRange(min=1), help="Tokens that MODEL generates.  [default: 64]")
@click.option("--memory/--no-memory", default=None, help="Measure the memory of MODEL.  [default: yes]")
@click.option("--device", default="auto", show_default=True, help=DEVICE_HELP)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of a CPU.  [default: torch's own]")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Repeats of each measurement."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random factors, inputs and prompts.")
@click.option("--out", metavar="FILE.json", help="Write the figures to this file, with machine and versions.")
@click.option("--plot", metavar="FILE.png", help="Draw the times of layers over the number of tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON on standard output.")
@click.option("--quiet", is_flag=True, help="No progress.")
@click.pass_context
def bench(ctx: click.Context, /, model: str | None, out: str | None, as_json: bool, quiet: bool, **given: Any) -> None:
    """Measure the speed of compressed layers, or of the compressed MODEL, beside dense ones.

    Without MODEL, random layers are measured: microseconds of every backend and of dense products, with weights that
    are not in the cache.  With MODEL, a folder: tokens per second of prefill and decode, and memory.
    """
    _check_options(model, given)
    for option, path in (("--out", out), ("--plot", given["plot"])):
        _check_writable(option, path)
    from cospadi.evaluation.speed import LayerFigures, plot_layers, require_matplotlib
    from cospadi.reporting import machine, versions

    if given["plot"]:
        require_matplotlib()
    tell = (lambda text: None) if quiet else (lambda text: click.echo(text, err=True))
    with torch_threads(given["threads"]):
        figures = _measure_model(model, given, tell) if model else _measure_layers(given, tell)
        here = machine()
    record = {
        "command": command_of(ctx.obj),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": here,
        "versions": versions(),
        "seed": given["seed"],
        **figures.to_dict(),
    }
    if out:
        Path(out).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if isinstance(figures, LayerFigures) and given["plot"]:
        plot_layers(figures, given["plot"])
    if as_json:
        print_json(record)
    elif isinstance(figures, LayerFigures):
        show_layers(figures, here)
    else:
        show_model(figures, here)


def _measure_layers(given: dict[str, Any], tell: Callable[[str], None]) -> "LayerFigures":
    from cospadi.evaluation.speed import LAYER_SHAPES, LayerSettings, measure_layers

    named = given["shapes"] or (None if given["shape"] else "standard")
    sets = LAYER_SHAPES if named == "all" else [named] if named else []
    settings = LayerSettings(
        shapes=(*(shape for name in sets for shape in LAYER_SHAPES[name]), *given["shape"]),
        ratios=given["ratio"] or (0.3,),
        tokens=given["tokens"] or (1, 8, 512),
        dtypes=torch_dtypes(given["dtype"] or ("bfloat16",)),
        value_dtype=given["value_dtype"] or "bfloat16",
        backends=given["backend"],
        device=speed_device(given["device"]),
        repeats=given["repeats"],
        seed=given["seed"],
    )
    return measure_layers(settings, tell)


def _measure_model(model: str, given: dict[str, Any], tell: Callable[[str], None]) -> "ModelFigures":
    from cospadi.evaluation.speed import ModelSettings, measure_model

    settings = ModelSettings(
        model=model,
        baseline=given["baseline"],
        backends=given["backend"] or ("auto",),
        dtypes=torch_dtypes(given["dtype"] or ("bfloat16", "float32")),
        prompt_tokens=given["prompt_tokens"] or 512,
        new_tokens=given["new_tokens"] or 64,
        device=speed_device(given["device"]),
        repeats=given["repeats"],
        seed=given["seed"],
        memory=given["memory"] is not False,
    )
    quieten_libraries()
    figures = measure_model(settings, tell)
    # A record names files without their folders.
    baseline = None if settings.baseline is None else Path(settings.baseline).name
    named = replace(settings, model=Path(model).name, baseline=baseline)
    return replace(figures, settings=named, baseline=baseline or figures.baseline)


def _check_options(model: str | None, given: dict[str, Any]) -> None:
    """Refuse options of layers with a model, and options of models without one."""
    for name in _OF_LAYERS if model else _OF_MODELS:
        if given[name] not in (None, ()):
            option = f"--{name.replace('_', '-')}"
            todo = "layers: leave it out, or MODEL" if model else "models: give MODEL"
            raise click.UsageError(f"{option} is for {todo}")
    if len(set(given["backend"])) < len(given["backend"]):
        raise click.UsageError("--backend: the same backend was given twice")


def _check_writable(option: str, path: str | None) -> None:
    """Refuse a file that has no folder, before anything is measured."""
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise click.UsageError(f"{option} {path}: expected a file in a folder that exists")


def command_of(typed: str) -> str:
    """Give a command line that names files without their folders."""

    def bare(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return option + equals + (Path(value).name if "/" in value else value)

    return shlex.join(bare(argument) for argument in shlex.split(typed))
