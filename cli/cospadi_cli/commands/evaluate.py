"""``eval``: perplexity and multiple choice of a model, optionally beside a baseline."""

from typing import Any

import click

from cospadi_cli.console import print_json, quieten_libraries, working
from cospadi_cli.evaluation_protocol import check_backend, make_protocol, open_evaluation_text
from cospadi_cli.options import execution_from, execution_options, recipe_options
from cospadi_cli.report_tables import show_evaluation


@click.command("eval")
@click.argument("path")
@click.option("--text", metavar="FILE|hf:NAME", help="Text to predict; default: the package's own held-out text.")
@click.option(
    "--tokens", type=click.IntRange(min=2), default=8192, show_default=True, help="Tokens of the text to use."
)
@click.option("--window", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens per window.")
@click.option("--baseline", metavar="PATH", help="Measure this model too, usually the dense one.")
@click.option(
    "--choices", metavar="FILE", help="Multiple choice from JSON lines, or 'embedded' for the package's sample."
)
@recipe_options("backend", "device")
@execution_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
@click.option("--quiet", is_flag=True, help="No progress.")
def evaluate(
    path: str,
    text: str | None,
    tokens: int,
    window: int,
    baseline: str | None,
    choices: str | None,
    backend: str | None,
    device: str | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Evaluate the model at PATH, compressed or dense.

    A line of the file for --choices is {"prompt": "...", "choices": ["...", "..."], "answer": 0}.
    """
    from cospadi.errors import UsageError
    from cospadi.evaluation import Comparison, measure_folders, read_questions
    from cospadi.recipe import CompressionConfig

    execution = execution_from(values)
    defaults = CompressionConfig()
    backend, device = backend or defaults.backend, device or defaults.device
    check_backend(backend)
    questions = read_questions(choices) if choices else None
    opened = open_evaluation_text(text)
    quieten_libraries()
    protocol = make_protocol(path, opened, tokens, window, questions=questions)
    if protocol is None:
        raise UsageError(f"{path} is not a causal language model: perplexity needs one")
    paths = (path,) if baseline is None else (baseline, path)
    with working(f"evaluating {' and '.join(paths)}", quiet):
        found = measure_folders(paths, protocol, backend, device, execution)
    compared = Comparison(protocol, found[0] if baseline is not None else None, found[-1]).to_dict()
    if as_json:
        print_json({"model": path, "baseline_model": baseline, **compared})
    else:
        show_evaluation(path, compared)
