"""The progress of a run: a live display or plain lines, a log, JSON lines."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from cospadi.events import (
    Calibrated,
    Event,
    GroupFinished,
    Listener,
    Planned,
    Predicted,
    Progress,
    Retried,
    Stopped,
    Written,
)
from cospadi.pipeline import TimeLeft
from cospadi_cli.console import console, printable, size
from cospadi_cli.log_files import as_json, open_lines, stamped, standard_output
from cospadi_cli.report_tables import stored_as

_INTERVAL = 30.0
"""Seconds between plain lines about a stage, its first and last ones apart."""
_LAYERS = 8
"""Rows of the live table."""
_COUNTED = {"calibrating": "windows", "profiling": "groups", "correcting": "sample groups", "evaluating": "batches"}

Clock = Callable[[], float]


@contextmanager
def progress(quiet: bool, log: Path | None = None, events: str | None = None) -> Iterator[Listener]:
    """Give a listener that shows a run on standard error and writes what files were asked for.

    Parameters
    ----------
    quiet : bool
        Show nothing; the files are written all the same.
    log : Path, optional
        Plain lines with their time in UTC are appended to it.
    events : str, optional
        Every event is appended to this file, or written to standard output for ``-``, as a JSON object on one line.

    Raises
    ------
    UsageError
        A file cannot be opened.
    """
    with ExitStack() as stack:
        listeners: list[Listener] = []
        if log is not None:
            listeners.append(Lines(stamped(stack.enter_context(open_lines("--log-file", log)))))
        if events is not None:
            file = standard_output() if events == "-" else stack.enter_context(open_lines("--events", Path(events)))
            listeners.append(as_json(file))
        screen = console(stderr=True)
        if not quiet and screen.is_terminal:
            display = Display(screen)
            stack.enter_context(Live(display, console=screen, refresh_per_second=4))
            listeners.append(display.listen)
        elif not quiet:
            lines = Lines(lambda line: click.echo(line, err=True))
            listeners.append(lambda event: None if isinstance(event, Stopped) else lines(event))

        def listen(event: Event) -> None:
            for listener in listeners:
                listener(event)

        yield listen


class Lines:
    """A listener that writes plain lines: one for each layer and each change of stage, else one in half a minute.

    Parameters
    ----------
    write : callable
        Receives a line.
    clock : callable
        Gives seconds.
    """

    def __init__(self, write: Callable[[str], None], clock: Clock = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._time_left, self._stage, self._last = TimeLeft(clock()), "", 0.0

    def __call__(self, event: Event) -> None:
        """Handle an event."""
        now = self._clock()
        self._time_left.observe(event, now)
        if isinstance(event, Progress) and not isinstance(event, GroupFinished):
            begins, ends = event.stage != self._stage, event.done >= event.total
            if not begins and not ends and now - self._last < _INTERVAL:
                return
            self._stage, self._last = event.stage, now
        left = self._time_left.left(now) if isinstance(event, Progress) else None
        self._write(describe_event(event) + (f"; {duration(left)} left" if left is not None else ""))


class Display:
    """The display of a terminal: the last layers, the memory, and the stage with its bar and the time left.

    Parameters
    ----------
    screen : Console
        Lines that stay are printed on it, above the display.
    clock : callable
        Gives seconds.
    """

    def __init__(self, screen: Console, clock: Clock = time.monotonic) -> None:
        self._screen, self._clock, self._time_left = screen, clock, TimeLeft(clock())
        self._memory = ""
        self._rows: deque[tuple[str, ...]] = deque(maxlen=_LAYERS)
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            _Left(self),
            console=screen,
        )
        self._task = self._bars.add_task("loading the model", total=None, counts="")
        self._stage = ""

    def __rich__(self) -> Group:
        table = Table(box=None, pad_edge=False, padding=(0, 2), style="dim")
        for heading in ("layer", "stored as", "size", "error", "bytes", "seconds"):
            table.add_column(heading, justify="left" if heading in ("layer", "stored as") else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*map(Text, row))
        memory = [Text(self._memory, style="dim")] if self._memory else []
        return Group(*([table] if self._rows else []), *memory, self._bars)

    def listen(self, event: Event) -> None:
        """Handle an event."""
        self._time_left.observe(event, self._clock())
        if isinstance(event, Predicted):
            self._memory = describe_event(event)
        elif isinstance(event, Progress):
            self._advance(event)
            if event.done >= event.total and not isinstance(event, GroupFinished):
                self._screen.print(Text(describe_event(event)))
        elif not isinstance(event, Stopped):  # printed last, below the display
            self._screen.print(Text(describe_event(event)))
        if isinstance(event, GroupFinished):
            self._rows.append(_cells(event))

    def left(self) -> str:
        """Give the time left in words, empty while it is not known."""
        left = self._time_left.left(self._clock())
        return "" if left is None else f"{duration(left)} left"

    def _advance(self, event: Progress) -> None:
        if event.stage != self._stage:
            self._stage = event.stage
            self._bars.reset(self._task, description=event.stage)
        self._bars.update(
            self._task, total=event.work_total, completed=event.work_done, counts=f"{event.done}/{event.total}"
        )


class _Left(ProgressColumn):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def render(self, task: Task) -> Text:
        return Text(self._display.left())


def describe_event(event: Event) -> str:
    """Phrase one event on one line, without control characters."""
    return printable(_phrase(event))


def _phrase(event: Event) -> str:
    match event:
        case Planned():
            solver = f"; solver {event.solver} ({event.reason})" if event.n_factors else ""
            return (
                f"{event.n_layers} layers: {event.n_factors} groups as factors, {event.n_units - event.n_factors} "
                f"groups sparse or quantised, {event.n_dense} layers kept dense{solver}"
            )
        case GroupFinished():
            name, kind, dimensions, error, n_bytes, seconds = _cells(event)
            how = "from the interrupted run" if event.resumed else f"{seconds} s"
            dense = size(event.row["dense_bytes"])
            stored = f"{kind} {dimensions}".strip()
            return f"[{event.done}/{event.total}] {name}: {stored}, error {error}, {n_bytes} of {dense}, {how}"
        case Progress():
            counted = event.of if isinstance(event, Calibrated) else _COUNTED[event.stage]
            return f"{event.stage}: {event.done} of {event.total} {counted}"
        case Predicted():
            parts = ("baseline", "weights", "grams", "activations", "solving")
            limit = f" of {size(event.limit)} allowed" if event.limit is not None else ""
            return (
                f"predicted peak memory {size(event.peak)}{limit} "
                f"({', '.join(f'{part} {size(getattr(event, part))}' for part in parts)})"
            )
        case Retried():
            return f"retried: {event.task} ({event.reason})"
        case Written():
            return f"written to {event.path}"
        case Stopped():
            again = f" Finished work is kept. To continue: {event.resume}" if event.resume else ""
            return f"{event.reason}.{again}"
    raise AssertionError(f"unknown event {event!r}")


def _cells(event: GroupFinished) -> tuple[str, ...]:
    """Give a layer's name, storage, size k x s, error, bytes and seconds."""
    row = event.row
    shared = f" (+{len(row['members']) - 1})" if len(row["members"]) > 1 else ""
    dimensions = "" if row["n_atoms"] is None else f"{row['n_atoms']} x {row['n_nonzero']}"
    seconds = "" if event.resumed else f"{event.seconds:.1f}"
    return (
        printable(row["name"]) + shared,
        stored_as(row),
        dimensions,
        f"{row['relative_error']:.4f}",
        size(row["bytes"]),
        seconds,
    )


def duration(seconds: float) -> str:
    """Phrase a time in its two largest units."""
    seconds = round(seconds)
    for name, length, below, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= length:
            return f"{seconds // length} {name} {seconds % length // part} {below}"
    return f"{seconds} s"
