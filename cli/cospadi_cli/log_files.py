"""Files that a run appends lines to; a file that cannot be written does not stop the run."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import click

from cospadi.errors import UsageError
from cospadi.events import Event, Listener


class LineFile:
    """An open file that lines are appended to; lines for which there is no room are dropped, with one warning.

    Parameters
    ----------
    file : binary file without a buffer
    name : str
        Used in the warning.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._torn = self._warned = False

    def write(self, line: str) -> None:
        """Write a line without buffering."""
        # After a line that a full disk cut short, the next one needs a new line.
        data = (b"\n" if self._torn else b"") + f"{line}\n".encode()
        try:
            written = self._file.write(data) or 0
            self._torn = written < len(data) and (self._torn or written > 0)
            reason = "no room for a whole line" if written < len(data) else ""
        except OSError as error:
            reason = str(error)
        if reason and not self._warned:
            self._warned = True
            click.echo(f"Warning: {self._name} cannot be written ({reason}); the run goes on without it", err=True)


def stamped(file: LineFile) -> Callable[[str], None]:
    """Give a function that writes lines with their time in UTC."""
    return lambda line: file.write(f"{_utc('seconds')} {line}")


def as_json(file: LineFile) -> Listener:
    """Give a listener that writes every event as JSON on one line, with the time and the CPU seconds so far."""

    def listen(event: Event) -> None:
        times = {"time": _utc("milliseconds"), "cpu_seconds": round(time.process_time(), 3)}
        file.write(json.dumps({**times, **event.to_dict()}, allow_nan=False))

    return listen


@contextmanager
def open_lines(option: str, path: Path) -> Iterator[LineFile]:
    """Open a file that lines are appended to.

    Raises
    ------
    UsageError
        It cannot be written.
    """
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise UsageError(f"{option} {path}: cannot be written ({error.strerror})") from error
    with file:
        yield LineFile(file, f"{option} {path}")


def standard_output() -> LineFile:
    """Give standard output as a ``LineFile``."""
    # Unbuffered: at its end Python would try to flush a buffer to a reader that has gone.
    return LineFile(getattr(sys.stdout.buffer, "raw", sys.stdout.buffer), "standard output")


def _utc(precision: str) -> str:
    return datetime.now(timezone.utc).isoformat(timespec=precision).replace("+00:00", "Z")
