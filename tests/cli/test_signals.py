"""Signals: a run that is told to stop, in a process of its own."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.cli.conftest import compress_command, error_line, read_report

SLOW = """
import sys, time
from contextlib import contextmanager
from cospadi_cli import compression_run
from cospadi_cli.main import main

real = compression_run.progress

@contextmanager
def slow(*arguments):
    with real(*arguments) as tell:
        def listen(event):
            tell(event)
            if event.event == "group_finished" and event.done == 2:
                print("ready", flush=True)
                time.sleep(100)
        yield listen

compression_run.progress = slow
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("signals", "code", "word", "more"),
    [
        ([signal.SIGTERM], 143, "terminated", ()),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted", ("--workers", "2", "--threads", "1")),
    ],
    ids=["sigterm", "ctrl-c twice with workers"],
)
def test_a_signal_keeps_finished_work_and_says_how_to_continue(
    run, tiny_model, compression, home, signals, code, word, more
):
    own = compress_command(tiny_model, "out", "--log-file", "log", "--events", "events")
    command = [*own, *more]
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout.readline() == "ready\n"
    for number in signals:
        os.killpg(child.pid, number)  # a terminal sends it to the workers as well
    _, errors = child.communicate(timeout=60)  # until the workers have closed it, too
    assert child.returncode == code, errors
    again = f"cospadi-cli {' '.join(command)} --resume"
    assert errors.count(f"To continue: {again}") == 1
    assert errors.splitlines()[-1] == f"Error: {word}"
    assert "Traceback" not in errors
    assert f"{word}. Finished work is kept. To continue: {again}" in (home / "log").read_text()
    last = json.loads((home / "events").read_text().splitlines()[-1])
    assert (last["event"], last["reason"], last["resume"]) == ("stopped", word, again)
    assert "--resume" in error_line(run(*own))  # without it the run is not continued
    resumed = run(*own, "--resume")  # the number of workers may change
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stderr.count("from the interrupted run") == 2
    assert read_report("out") == compression.report
