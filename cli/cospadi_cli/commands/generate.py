"""``generate``: the continuation of a prompt by a model."""

import click

from cospadi_cli.console import print_json, quieten_libraries
from cospadi_cli.evaluation_protocol import check_backend
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

    defaults = CompressionConfig()
    backend, device = backend or defaults.backend, device or defaults.device
    check_backend(backend)
    quieten_libraries()
    model = load_model(path, backend, device)
    continuation = continue_prompt(model, read_tokenizer(path), prompt, max_new_tokens)
    if as_json:
        print_json({"model": path, "prompt": prompt, "continuation": continuation})
    else:
        click.echo(prompt + continuation)
