"""``generate``: what a model writes."""

import click

from cospadi_cli import render
from cospadi_cli.options import recipe_options


@click.command()
@click.argument("path")
@click.option("--prompt", required=True, help="Text to continue.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=60, show_default=True, help="Longest continuation."
)
@recipe_options("backend", "device")
@click.option("--json", "as_json", is_flag=True, help="Print prompt and continuation as JSON.")
def generate(
    path: str, prompt: str, max_new_tokens: int, backend: str | None, device: str | None, as_json: bool
) -> None:
    """Continue a prompt greedily with the model at PATH, compressed or dense."""
    from cospadi.evaluation import generate as continue_prompt
    from cospadi.evaluation import load_model
    from cospadi.models import read_tokenizer
    from cospadi.recipe import CompressionConfig
    from cospadi_cli import measuring

    defaults = CompressionConfig()
    backend, device = backend or defaults.backend, device or defaults.device
    measuring.check_backend(backend)
    render.quieten_libraries()
    model = load_model(path, backend, device)
    continuation = continue_prompt(model, read_tokenizer(path), prompt, max_new_tokens)
    if as_json:
        render.print_json({"model": path, "prompt": prompt, "continuation": continuation})
    else:
        click.echo(prompt + continuation)
