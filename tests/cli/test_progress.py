import io
import os
from pathlib import Path

import pytest
from cospadi_cli.log_files import LineFile
from cospadi_cli.options import execution_from
from cospadi_cli.progress import Display, Lines, describe_event, duration, progress
from rich.console import Console

from cospadi import events
from cospadi.recipe.resources import Execution
from tests.cli.conftest import compress_command, error_line
from tests.test_events import SAMPLES

ROW = {
    "name": "layers.0.down",
    "members": [{"name": "layers.0.down"}, {"name": "layers.0.up"}],
    "kind": "factors",
    "side": "input",
    "n_atoms": 40,
    "n_nonzero": 20,
    "value_dtype": "int8",
    "dictionary_dtype": "int8",
    "relative_error": 0.125,
    "bytes": 1500,
    "dense_bytes": 3_000_000,
}


def finished(done, total, seconds=2.0, resumed=False, **changes):
    return events.GroupFinished({**ROW, **changes}, done, total, seconds, resumed)


class Clock:
    """A clock that a test turns."""

    now = 0.0

    def __call__(self):
        return self.now


def lines_of(timed):
    """The plain lines for events, each with the time at which it comes."""
    clock, written = Clock(), []
    lines = Lines(written.append, clock)
    for clock.now, event in timed:
        lines(event)
    return written


def test_a_layer_is_told_on_one_line_with_its_size_error_bytes_and_the_time_left():
    (line,) = lines_of([(2.0, finished(1, 61))])
    assert (
        line
        == "[1/61] layers.0.down (+1): factors int8 40 x 20, error 0.1250, 1.50 kB of 3.00 MB, 2.0 s; 2 min 0 s left"
    )
    assert "from the interrupted run" in describe_event(finished(1, 2, resumed=True))


def test_small_steps_are_told_each_half_minute_and_ends_always():
    timed = [(float(t), events.Calibrated(t, 100, "windows")) for t in range(101)]
    assert [line.split()[1] for line in lines_of(timed)] == ["0", "30", "60", "90", "100"]
    both = [*timed, (101.0, events.Profiled(0, 2)), (102.0, events.Profiled(1, 2)), (103.0, events.Profiled(2, 2))]
    assert [line.split()[:2] for line in lines_of(both)[-2:]] == [["profiling:", "0"], ["profiling:", "2"]]


def test_every_layer_is_told():
    assert len(lines_of([(t / 10, finished(t, 50)) for t in range(1, 51)])) == 50


def test_hostile_names_cannot_drive_a_terminal():
    said = describe_event(finished(1, 2, name="a\x1b[2J\nb\u202e"))
    assert said.isprintable()
    stopped = describe_event(events.Stopped("broken\nin two", "cospadi-cli compress 'a  b'"))
    assert stopped.isprintable()
    assert "'a  b'" in stopped  # a command must survive as it is


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (7380, "2 h 3 min"), (200_000, "2 d 7 h")],
)
def test_times_are_phrased_in_two_units(seconds, said):
    assert duration(seconds) == said


def test_the_display_shows_stage_memory_time_left_and_the_last_layers():
    clock = Clock()
    screen = Console(file=io.StringIO(), force_terminal=True, width=110, color_system=None)
    display = Display(screen, clock)
    screen.print(display)
    display.listen(events.Predicted(1, 2, 3, 4, 5, 2_500_000_000, 3_000_000_000))
    display.listen(events.Planned(60, 30, 30, 0, "htp", "the best"))
    for done in range(1, 13):
        clock.now = done * 10.0
        display.listen(finished(done, 60, name=f"layers.{done}.down"))
    clock.now += 1.0
    before = screen.file.tell()
    screen.print(display)
    shown = screen.file.getvalue()[before:]
    assert "12/60" in shown
    assert "solving" in shown
    assert "7 min 59 s left" in shown
    assert "predicted peak memory 2.50 GB of 3.00 GB allowed" in shown
    assert "layers.12.down" in shown
    assert "layers.5.down" in shown
    assert "layers.4.down" not in shown
    for cell in ("factors int8", "40 x 20", "0.1250", "1.50 kB", "2.0"):
        assert cell in shown
    assert "htp (the best)" in screen.file.getvalue()[:before]


@pytest.mark.parametrize("sample", [finished(1, 2), *(s for s in SAMPLES if s.event != "group_finished")])
def test_the_display_and_the_lines_take_every_event(sample):
    assert describe_event(sample).isprintable()
    screen = Console(file=io.StringIO(), force_terminal=True, width=110)
    display = Display(screen, Clock())
    display.listen(sample)
    screen.print(display)
    assert screen.file.getvalue()


def test_in_a_terminal_it_is_live_and_the_log_stays_plain(tmp_path, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=110)
    monkeypatch.setattr("cospadi_cli.progress.console", lambda stderr: screen)
    with progress(False, tmp_path / "log") as tell:
        tell(events.Calibrated(1, 2, "windows"))
        tell(finished(1, 2, name="layers.\x1b[2J"))
        tell(events.Stopped("interrupted", "again"))
    shown = screen.file.getvalue()
    assert "\x1b[" in shown
    assert "1/2" in shown
    assert "\x1b[2J" not in shown  # the name's own, that would clear the screen
    assert "again" not in shown
    assert all(line.isprintable() for line in (tmp_path / "log").read_text().splitlines())


class Disk(io.BytesIO):
    """A file on a disk with room for so many bytes."""

    room = 0

    def write(self, data):
        if self.room == 0:
            raise OSError(28, "No space left on device")
        kept = data[: self.room]
        self.room -= len(kept)
        return super().write(kept)


def test_on_a_full_disk_lines_are_dropped_with_one_warning_and_later_ones_stay_whole(capsys):
    disk = Disk()
    file = LineFile(disk, "--log-file x")
    for room, line in (
        (100, "first"),
        (3, "torn line"),
        (0, "lost"),
        (0, "lost"),
        (2, "no"),
        (100, "whole"),
        (100, "end"),
    ):
        disk.room = room
        file.write(line)
    written = disk.getvalue().decode().splitlines()
    assert {"first", "whole", "end"} <= set(written)
    assert not any("whole" in line and line != "whole" for line in written)
    assert capsys.readouterr().err.count("Warning") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_events_go_on_after_a_log_that_cannot_be_written(tmp_path, capsys):
    with progress(True, Path("/dev/full"), str(tmp_path / "events")) as tell:
        for done in (1, 2):
            tell(finished(done, 2))
    assert capsys.readouterr().err.count("Warning: --log-file /dev/full") == 1
    assert len((tmp_path / "events").read_text().splitlines()) == 2


def test_two_claims_on_standard_output_are_refused(run, tiny_model):
    result = run(*compress_command(tiny_model, "out", "--json", "--events", "-"))
    assert "standard output" in error_line(result)


@pytest.mark.parametrize("option", ["--log-file", "--events"])
def test_a_file_that_cannot_be_opened_is_refused(run, tiny_model, option):
    result = run(*compress_command(tiny_model, "out", "--quiet"), option, "missing/folder/file")
    assert result.exit_code == 2
    assert f"{option} missing/folder/file" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_failure_is_in_the_log(tmp_path):
    with progress(True, tmp_path / "log") as tell:
        tell(events.Stopped("no space left on device", "cospadi-cli compress x --resume"))
    assert (tmp_path / "log").read_text().endswith("To continue: cospadi-cli compress x --resume\n")


def test_the_execution_is_read_from_the_options():
    nothing = {"max_memory": None, "workers": None, "threads": None, "ray_address": None}
    values = {**nothing, "executor": "local", "ray_inputs": "shared", "other": 1}
    assert execution_from(values) == Execution()
    assert values == {"other": 1}
    values |= {**nothing, "executor": "ray", "ray_inputs": "object-store", "max_memory": "2GiB", "workers": 3}
    expected = Execution(max_memory=2 * 2**30, executor="ray", workers=3, ray_inputs="object-store")
    assert execution_from(values) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-memory", "8G"], ["8G", "8GiB"]),
        (["--threads", "few"], ["--threads"]),
        (["--executor", "slurm"], ["local", "ray"]),
    ],
)
def test_wrong_execution_options_are_refused_in_one_line(run, arguments, words):
    line = error_line(run("demo", *arguments))
    assert all(word in line for word in words)
