"""What ``status`` tells of runs that go on, were interrupted or have finished, and of caches."""

import json
import os
from pathlib import Path

import pytest
import torch

from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.files.durable import mark_of, seal
from cospadi.formats.checkpoint import QUANT_METHOD
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group
from cospadi.pipeline.statistics_store import Measurements, payloads
from cospadi.pipeline.work_folder import WORK, GroupRecord, WorkFolder
from cospadi.recipe.options import CompressionConfig
from tests.cli.conftest import error_line

RECIPE = json.dumps(CompressionConfig(ratio=0.35, solver="htp").to_dict())
PRINT = {"model": "a", "calibration": "b", "recipe": RECIPE, "versions": "{}"}
COMMAND = "cospadi-cli compress model -o out"
GROUPS = ["layers.0.q", "layers.0.k", "layers.1.q"]
SOURCES = ["layers.0.q", "layers.1.q", "layers.1.o", "layers.2.q"]


def group(name):
    factors = SparseFactorization(torch.ones(3, 2), {name: torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 1.0]])})
    return GroupRecord(*pack_group(factors, "bitmask", "float32", {}, True), {"name": name})


def measured(name):
    found = SourceStatistics(name, 3, {name: 2})
    found.add_inputs(torch.ones(4, 3))
    found.n_tokens = 4
    return found


@pytest.fixture
def begun(home):
    """A run in the middle of its work: all inputs but two, one of three profiles, one of three groups."""
    folder = WorkFolder(home / "out", PRINT, resume=False, threads=2)
    kept = Measurements(folder.folder / "measurements", {"model": "a"})
    folder.note("command", COMMAND)
    folder.note("model", "some/model")
    folder.note("sources", SOURCES)
    folder.note("measurements", str(kept.folder))
    for name in SOURCES[:2]:
        kept.store(measured(name))
    folder.note("profiles", [str(kept.text_path(name, {})) for name in GROUPS])
    kept.keep_text(GROUPS[0], {}, "text")
    folder.note("corrections", [])
    folder.note("plan", [{"name": name, "kind": "factors", "cost": 1.0} for name in GROUPS])
    folder.note("seconds", {"calibrating": 12.5})
    folder.store(1, group(GROUPS[1]))
    yield folder, kept
    folder.close()


def stages(found):
    return {stage["name"]: (stage["done"], stage["total"]) for stage in found["stages"]}


def shown(run, *arguments):
    result = run("status", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_run_that_goes_on_and_is_interrupted(run, begun):
    folder, _ = begun
    found = shown(run, "out")
    assert (found["state"], found["process"]["pid"]) == ("running", os.getpid())
    assert stages(found) == {"calibrating": (2, 4), "profiling": (1, 3), "solving": (1, 3)}
    assert {s["name"]: s["seconds"] for s in found["stages"]} == {
        "calibrating": 12.5,
        "profiling": None,
        "solving": None,
    }
    assert found["stages"][0]["left"] == SOURCES[2:]
    assert found["stages"][2]["left"] == ["layers.0.q", "layers.1.q"]
    assert found["recipe"] == {"ratio": "0.35", "solver": "htp"}
    assert (found["model"], found["threads"], found["damaged"]) == ("some/model", 2, [])
    records = [path for path in folder.folder.rglob("*") if path.is_file() and path.name not in ("lock", "facts.json")]
    assert found["bytes"] == sum(path.stat().st_size for path in records)
    assert found["last_activity"] == max(path.stat().st_mtime for path in records)
    text = run("status", "out").stdout
    assert f"out: running (pid {os.getpid()} on host " in text
    assert "to continue" not in text
    folder.close()
    assert shown(run, "out", "--verify") == found | {"state": "interrupted", "process": None}
    text = run("status", "out").stdout
    for words in (
        "out: interrupted",
        "some/model",
        "ratio 0.35, solver htp",
        "calibrating",
        f"to continue: {COMMAND} --resume",
    ):
        assert words in text
    assert "not done in solving: layers.0.q, layers.1.q" in text
    assert not [path for path in folder.folder.rglob("*.tmp")]


def test_the_work_folder_itself_may_be_given_and_nothing_is_written(run, begun, monkeypatch):
    folder, _ = begun
    folder.close()
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    found = shown(run, "out")
    assert shown(run, f"out/{WORK}") == found | {"path": f"out/{WORK}"}
    monkeypatch.chdir(folder.folder)
    assert shown(run, ".") == found | {"path": "."}
    monkeypatch.chdir("../..")
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before


def test_the_command_is_not_told_to_resume_twice(run, begun):
    begun[0].note("command", f"{COMMAND} --resume --quiet")
    assert shown(run, "out")["command"] == f"{COMMAND} --resume --quiet"


def test_damaged_records_are_named_and_count_as_left(run, begun):
    folder, kept = begun
    tensors = folder.folder / "group-00001.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    (payload,) = payloads(kept.folder, SOURCES[0])
    payload.write_bytes(payload.read_bytes()[:-1])
    text = kept.text_path(GROUPS[0], {})
    text.write_bytes(text.read_bytes()[:-1])
    found = shown(run, "out")
    assert found["damaged"] == [SOURCES[0], text.stem, GROUPS[1]]
    assert stages(found) == {"calibrating": (1, 4), "profiling": (0, 3), "solving": (0, 3)}
    assert "damaged, will be made again: layers.0.q" in run("status", "out").stdout


def test_a_flipped_bit_is_found_when_every_record_is_read(run, begun):
    folder, kept = begun
    for path in (folder.folder / "group-00001.safetensors", payloads(kept.folder, SOURCES[0])[0]):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert shown(run, "out")["damaged"] == []
    assert shown(run, "out", "--verify")["damaged"] == [SOURCES[0], GROUPS[1]]


def test_a_group_that_is_half_written_is_left_and_not_damaged(run, begun):
    mark_of(begun[0].folder / "group-00001.safetensors").unlink()
    found = shown(run, "out")
    assert stages(found)["solving"] == (0, 3)
    assert found["damaged"] == []


def test_a_run_that_has_noted_nothing_yet(run, home):
    with WorkFolder(home / "out", PRINT, resume=False) as folder:
        found = shown(run, "out")
        assert stages(found) == dict.fromkeys(("calibrating", "profiling", "correcting", "solving"), (0, None))
        assert found["command"] is None
        folder.store(0, group("x"))
        Measurements(folder.folder / "measurements", {}).store(measured("x"))
        assert stages(shown(run, "out"))["solving"] == (1, None)
        assert stages(shown(run, "out"))["calibrating"] == (1, None)
    assert "?" in run("status", "out").stdout
    (home / "empty" / WORK).mkdir(parents=True)
    assert shown(run, "empty")["state"] == "interrupted"


STRANGE = [None, 3, [], {}, [3], [[]], {"a": 1}, [{"name": 3}], "\x1b[2J", {"solving": "x"}]


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_notes_of_another_shape_are_no_traceback(run, begun, value):
    for key in ("command", "model", "sources", "measurements", "profiles", "corrections", "plan", "seconds"):
        begun[0].note(key, value)
    begun[0].close()
    assert shown(run, "out")["state"] == "interrupted"
    for arguments in (("out",), ("out", "--verify")):
        result = run("status", *arguments)
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.stdout


@pytest.mark.parametrize("data", [b"", b"{", seal([]), seal({"fingerprint": {"recipe": "["}, "threads": 1})])
def test_a_strange_fingerprint_is_no_traceback(run, begun, data):
    (begun[0].folder / "fingerprint.json").write_bytes(data)
    found = shown(run, "out")
    assert found["recipe"] in (None, {})
    assert ("fingerprint.json" in found["damaged"]) == (found["recipe"] is None)


def test_a_finished_checkpoint_says_so(run, home):
    out = home / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": QUANT_METHOD}}))
    (out / "run.json").write_text(json.dumps({"began": 5.0, "seconds": 7.25, "stages": {"solving": 3}}))
    found = shown(run, "out")
    assert found == {"path": "out", "state": "finished", "began": 5.0, "seconds": {"solving": 3.0, "in all": 7.25}}
    assert "out: finished" in run("status", "out").stdout
    for text in ("", "[]", '{"stages": 3}', '{"stages": {"a": "b"}, "began": 1}', "[" * 100_000):
        (out / "run.json").write_text(text)
        assert shown(run, "out") == {"path": "out", "state": "finished", "began": None, "seconds": {}}
    # Interrupted while the checkpoint was written: not finished.
    (out / WORK).mkdir()
    assert shown(run, "out")["state"] == "interrupted"


def test_a_cache_shows_what_it_keeps(run, home):
    for model, names in (("a", ["x", "y"]), ("b", ["x"])):
        kept = Measurements(home / "cache", {"model": model})
        for name in names:
            kept.store(measured(name))
        kept.keep_text("x", {}, "text")
    found = shown(run, "cache")
    assert found["state"] == "cache"
    counts = {
        part["facts"]["model"]: (part["inputs"], part["texts"], part["damaged"]) for part in found["measurements"]
    }
    assert counts == {"a": (2, 1, []), "b": (1, 1, [])}
    files = [path for path in (home / "cache").rglob("*") if path.is_file()]
    assert sum(part["bytes"] for part in found["measurements"]) == sum(path.stat().st_size for path in files)
    (payload,) = payloads(kept.folder)
    data = bytearray(payload.read_bytes())
    data[-1] ^= 1
    payload.write_bytes(data)
    kept.text_path("x", {}).write_bytes(b"{")
    assert sum(len(part["damaged"]) for part in shown(run, "cache", "--verify")["measurements"]) == 2
    assert kept.folder.name in run("status", "cache").stdout


@pytest.mark.parametrize("place", ["nothing", "empty", "file", "other"])
def test_a_folder_of_something_else_is_one_clear_line(run, home, place):
    (home / "empty").mkdir()
    (home / "file").write_text("x")
    (home / "other").mkdir()
    (home / "other" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    assert "holds no run: give the output folder" in error_line(run("status", place))
