"""What commands print with: consoles, tables, JSON, sizes, and texts that are safe for a terminal."""

import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120
"""Columns when the output is no terminal; rich would assume 80."""


def console(stderr: bool = False) -> Console:
    """Give a console on the current standard output or standard error."""
    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=_WIDTH)


def print_json(data: Any) -> None:
    """Print strict JSON on standard output."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))


def make_table(*columns: str, left: Collection[str], gap: int = 2) -> Table:
    """Give an empty table without a frame.

    Parameters
    ----------
    columns : str
        Headings.
    left : collection of str
        Headings of the columns that are aligned to the left; numbers are aligned to the right.
    gap : int
        Spaces between columns.
    """
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, gap, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def print_table(title: str, table: Table) -> None:
    """Print a table under its title, which as a part of the table would wrap at the table's width."""
    console().print(Text(title, style="bold"))
    console().print(table)


def size(n_bytes: float) -> str:
    """Phrase a number of bytes; 1 MB is 10^6 bytes."""
    unit = "B"
    for larger in ("kB", "MB", "GB"):
        if n_bytes < 1000:
            break
        n_bytes, unit = n_bytes / 1000, larger
    return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.2f} {unit}"


def printable(text: str) -> str:
    """Replace control characters, which a terminal would obey: texts may come from a hostile checkpoint."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)


def quieten_libraries() -> None:
    """Silence the progress bars and remarks of transformers and the hub; warnings of cospadi stay."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextmanager
def working(label: str, quiet: bool = False) -> Iterator[None]:
    """Show on standard error that something takes a while."""
    screen = console(stderr=True)
    if quiet:
        yield
    elif screen.is_terminal:
        with screen.status(label):
            yield
    else:
        screen.print(label, style=None, markup=False)
        yield
