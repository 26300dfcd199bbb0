"""Write docs/cli.md from the --help of every command; with --check only tell whether it is up to date."""

import sys
from collections.abc import Iterator
from pathlib import Path

import click
from cospadi_cli.main import PROGRAM, main

TARGET = Path(__file__).with_name("cli.md")
HEAD = """# Command line

Written by `python docs/make_cli.py` from `--help`; a test fails when it is stale.
"""


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Give a command and all below it, with the words that call it."""
    yield path, command
    for name, below in sorted(getattr(command, "commands", {}).items()):
        yield from commands(below, f"{path} {name}")


def render() -> str:
    """Give the text of docs/cli.md."""
    parts = [HEAD]
    for path, command in commands(main, PROGRAM):
        # A fixed width, so that the terminal of whoever runs this does not show.
        fixed = {**main.context_settings, "max_content_width": 100, "terminal_width": 100}
        with click.Context(command, info_name=path, **fixed) as context:
            parts.append(f"## `{path}`\n\n```text\n{command.get_help(context).strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != render():
            sys.exit("docs/cli.md is stale: run python docs/make_cli.py")
    else:
        TARGET.write_text(render(), encoding="utf-8")
