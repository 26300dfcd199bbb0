"""Outputs, folders, limits and processes that cannot be used."""

import os
import re
import sys
import time

import pytest

from cospadi.errors import CospadiError, UnavailableError, UsageError
from cospadi.files.lock import Lock
from cospadi.pipeline.work_folder import WORK
from cospadi.recipe.resources import Execution
from tests.helpers import tiny_model
from tests.pipeline.bad_input.common import nothing_begun, refused, run


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a read-only place that even root cannot write")
def test_an_output_that_cannot_be_written(folder):
    from pathlib import Path

    refused(UsageError, ["/proc/result", "cannot be used"], folder, Path("/proc/result"))


def test_an_output_that_is_a_file(folder, out):
    out.write_text("mine")
    refused(UsageError, ["is a file"], folder, out)
    assert out.read_text() == "mine"


def test_an_output_in_the_models_folder(folder, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    refused(UsageError, ["already holds a model"], folder, folder)
    refused(UsageError, ["already holds a model"], folder, folder, resume=True)
    for inside in (folder / "out", folder / "deep" / "out", folder / ".." / folder.name / "out"):
        refused(UsageError, ["lies in the folder of a model", str(folder)], folder, inside)
    (tmp_path / "link").symlink_to(folder)
    refused(UsageError, ["lies in the folder of a model"], folder, tmp_path / "link" / "out")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_two_runs_in_one_folder(folder, out):
    class Stop(Exception):
        pass

    def stop(event):
        if type(event).__name__ == "Planned":
            raise Stop

    with pytest.raises(Stop):
        run(folder, out, on_event=stop)
    lock = Lock(out / WORK / "lock")
    for resume in (False, True):
        refused(UsageError, ["in use by process", str(os.getpid())], folder, out, resume=resume)
    lock.release()
    run(folder, out, resume=True)


def test_a_cache_that_is_a_file(folder, out, tmp_path):
    (tmp_path / "cache").write_text("mine")
    refused(CospadiError, [str(tmp_path / "cache")], folder, out, cache=tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "mine"
    run(folder, out, resume=True)


@pytest.mark.parametrize("what", ["workers", "threads", "max_memory"])
@pytest.mark.parametrize("value", [0, -1])
def test_less_than_one(what, value):
    with pytest.raises(UsageError, match=re.escape(f"{what}={value}: expected at least 1")):
        Execution(**{what: value})


def test_too_little_memory_says_how_much_is_needed(folder, out):
    refused(UsageError, ["too little", "needs at least"], folder, out, execution=Execution(max_memory=2**20))
    assert nothing_begun(out)


def test_ray_that_is_not_installed(folder, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(UnavailableError, ["ray"], folder, out, execution=Execution(executor="ray"))


def test_an_object_for_several_workers(out):
    refused(UsageError, ["save it"], tiny_model("llama"), out, execution=Execution(workers=2))
    assert nothing_begun(out)


def test_refusing_is_quick(folder, out):
    """Nothing is asked of the network when a folder is damaged."""
    begin = time.perf_counter()
    (folder / "config.json").unlink()
    refused(UsageError, ["not a model folder", "config.json"], folder, out)
    refused(UsageError, ["no such folder"], folder / "absent" / "x", out)
    assert time.perf_counter() - begin < 10
