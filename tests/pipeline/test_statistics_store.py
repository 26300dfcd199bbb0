"""Statistics and texts that one run leaves for another."""

import errno
import hashlib
import itertools
import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.errors import CheckpointError
from cospadi.files.durable import file_name, seal, unseal
from cospadi.pipeline.statistics_store import FACTS as FACTS_FILE
from cospadi.pipeline.statistics_store import Measurements, digest

FACTS = {"model": "a", "seed": 0, "labels": None}


def statistics(name="model.layers.0.q_proj", seed=0):
    found = SourceStatistics(name, 4, {name: 3, f"{name}.other": 2}, weighted=True, note="how")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(7, 4, generator=generator)
    found.add_inputs(x)
    per_token = sum(
        layer.add(torch.randn(7, layer.squares.shape[0], generator=generator)) for layer in found.layers.values()
    )
    for layer in found.layers.values():
        layer.n_tokens = 7
    found.add_weighted(x, per_token)
    found.n_tokens = 9
    return found


def same(a, b):
    return (
        a.name == b.name
        and a.note == b.note
        and (a.n_tokens, a.gram.n_tokens) == (b.n_tokens, b.gram.n_tokens)
        and torch.equal(a.gram.matrix, b.gram.matrix)
        and torch.equal(a.weighted_gram().matrix, b.weighted_gram().matrix)
        and set(a.layers) == set(b.layers)
        and all(torch.equal(a.layers[n].squares, b.layers[n].squares) for n in a.layers)
        and all(a.layers[n].n_tokens == b.layers[n].n_tokens for n in a.layers)
    )


def the_payload(folder):
    (path,) = folder.rglob("*.safetensors")
    return path


def test_statistics_survive_exactly_and_so_do_their_names(tmp_path):
    kept = Measurements(tmp_path / "cache", FACTS)
    assert (len(kept), list(kept)) == (0, [])
    first, second = statistics("model.layers.0.q_proj"), statistics("h.10.mlp.c_fc", 1)
    kept.store(first)
    kept.store(second)
    for measurements in (kept, Measurements(tmp_path / "cache", dict(reversed(FACTS.items())))):
        assert sorted(measurements) == ["h.10.mlp.c_fc", "model.layers.0.q_proj"]
        assert len(measurements) == 2
        assert first.name in measurements
        for own in (first, second, first):
            assert same(measurements[own.name], own)
            assert not same(measurements[own.name], second if own is first else first)
    assert measurements.facts == FACTS
    assert unseal(kept.folder / FACTS_FILE) == FACTS


def test_what_is_stored_again_is_what_is_read(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    assert same(kept[statistics().name], statistics())
    kept.store(statistics(seed=5))
    assert same(kept[statistics().name], statistics(seed=5))


def test_what_is_missing_is_a_key_error(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    for key in ("model.layers.0.q_proj", "", "..", 3, None):
        assert key not in kept
    with pytest.raises(KeyError, match="q_proj"):
        kept["q_proj"]
    assert kept.get("q_proj") is None


def test_other_facts_have_a_folder_of_their_own(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    for change in ({"model": "b"}, {"seed": 1}, {"labels": "text"}, {"more": None}):
        other = Measurements(tmp_path, FACTS | change)
        assert statistics().name not in other
        assert len(other) == 0
        other.store(statistics(seed=2))
    assert same(Measurements(tmp_path, FACTS)[statistics().name], statistics())
    assert len(list(tmp_path.iterdir())) == 5


def test_the_digest_is_of_the_facts_and_not_of_their_order():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    distinct = [{"a": 1}, {"a": "1"}, {"a": None}, {"a": 1.5}, {"b": 1}, {}, {"a": {"b": 1}}]
    assert len({digest(facts) for facts in distinct}) == len(distinct)


NAMES = [
    "x" * 255,
    "ä" * 127,
    "a/b",
    "a\\b",
    "..",
    ".",
    "",
    "con",
    "nul.txt",
    "A.b",
    "a.B",
    "a.b",
    "a:b*?",
    "a\nb",
    "\0",
]


def test_any_name_of_a_layer_can_be_kept(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    for seed, name in enumerate(NAMES):
        kept.store(statistics(name, seed))
        kept.keep_text(name, {}, f"text {seed}")
    again = Measurements(tmp_path, FACTS)
    assert sorted(again) == sorted(NAMES)
    for seed, name in enumerate(NAMES):
        assert same(again[name], statistics(name, seed))
        assert again.text(name, {}) == f"text {seed}"
    assert {path.parent.parent for path in tmp_path.rglob("*.safetensors")} == {again.folder}


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(max_size=300), min_size=2, max_size=2, unique=True))
def test_file_names_are_short_plain_and_distinct_without_regard_to_case(names):
    made = [file_name(name) for name in names]
    assert len({name.lower() for name in made}) == 2
    for name in made:
        assert len(name) <= 120
        assert all(c.isascii() and (c.isalnum() or c in "._-") for c in name)


def damaged(data):
    """Give the bytes of a payload in many ways that are not its own."""
    yield from (b"", data[:-1], data[: len(data) // 2], bytes(len(data)), data + b"\0")
    for place in range(0, len(data), 11):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        yield bytes(flipped)


def test_damaged_statistics_count_as_missing_and_can_be_measured_again(tmp_path):
    name = statistics().name
    Measurements(tmp_path, FACTS).store(statistics())
    path = the_payload(tmp_path)
    for data in damaged(path.read_bytes()):
        path.write_bytes(data)
        fresh = Measurements(tmp_path, FACTS)
        assert name not in fresh
        assert list(fresh) == []
        with pytest.raises(KeyError):
            fresh[name]
    fresh.store(statistics(seed=1))
    assert same(Measurements(tmp_path, FACTS)[name], statistics(seed=1))
    assert the_payload(tmp_path).is_file()  # the only one: the damaged one is gone
    the_payload(tmp_path).unlink()
    assert name not in Measurements(tmp_path, FACTS)


def test_the_record_of_another_layer_is_not_taken(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics("a"))
    kept.store(statistics("b"))
    a, b = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: path.parent)
    a.rename(a.with_name(b.name)).write_bytes(b.read_bytes())
    assert list(Measurements(tmp_path, FACTS)) == ["b"]


def test_what_turns_bad_after_it_was_found_sound_is_an_error_that_says_what_to_do(tmp_path):
    kept, name = Measurements(tmp_path, FACTS), statistics().name
    kept.store(statistics())
    assert name in kept
    path = the_payload(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))  # a clock may be too coarse to tell
    assert name not in kept
    with pytest.raises(CheckpointError, match=r"q_proj in .* are damaged now: run again with --resume"):
        kept[name]
    assert name not in Measurements(tmp_path, FACTS)


def test_a_record_is_read_through_once_and_again_only_when_it_was_replaced(tmp_path, monkeypatch):
    import cospadi.pipeline.statistics_store as module

    Measurements(tmp_path, FACTS).store(statistics())
    read, checksum = [], module.checksum
    monkeypatch.setattr(module, "checksum", lambda path: read.append(path) or checksum(path))
    kept, name = Measurements(tmp_path, FACTS), statistics().name
    for _ in range(3):
        assert name in kept
        assert same(kept[name], statistics())
        assert len(kept) == 1
    assert len(read) == 1
    Measurements(tmp_path, FACTS).store(statistics(seed=4))  # another run that shares the folder; it reads one file
    assert name in kept
    assert name in kept
    assert len(read) == 3


def with_payload(path, data):
    """Put other bytes in place of a record, under the checksum that they have."""
    path.unlink()
    path.with_name(f"{hashlib.sha256(data).hexdigest()}.safetensors").write_bytes(data)


def header(**metadata):
    text = json.dumps({"__metadata__": metadata}).encode()
    return len(text).to_bytes(8, "little") + text


HOSTILE = [b"", b"\xff" * 50, header(), header(description="["), header(description="[" * 100_000)]
HOSTILE += [header(description="[]"), header(description="{}"), header(description='{"name": 3}')]


@pytest.mark.parametrize("payload", HOSTILE, ids=range(len(HOSTILE)))
def test_a_payload_that_is_something_else_counts_as_missing_though_its_checksum_is_right(tmp_path, payload):
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    with_payload(the_payload(tmp_path), payload)
    assert statistics().name not in kept
    assert list(kept) == []


@pytest.mark.parametrize("description", [{}, {"in_features": -1}, {"in_features": 2**40}, {"out_features": 3}])
def test_a_payload_of_another_kind_is_an_error_once_and_then_missing(tmp_path, description):
    kept, name = Measurements(tmp_path, FACTS), statistics().name
    kept.store(statistics())
    with_payload(the_payload(tmp_path), header(format="?", description=json.dumps({"name": name, **description})))
    with pytest.raises(CheckpointError, match=r"not saved source statistics.*it was deleted: run again with --resume"):
        kept[name]
    assert name not in Measurements(tmp_path, FACTS)


@pytest.mark.parametrize("when", ["before", "within", "after"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing_that_counts(tmp_path, monkeypatch, when, error):
    save = SourceStatistics.save

    def stop(self, path):
        if when != "before":
            save(self, path)
        if when == "within":
            path.write_bytes(path.read_bytes()[:100])
        raise error

    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics("old"))
    with monkeypatch.context() as patch:
        patch.setattr(SourceStatistics, "save", stop)
        for name in ("new", "old"):
            with pytest.raises(error):
                kept.store(statistics(name, seed=3))
    assert not list(tmp_path.rglob("*.tmp"))
    for measurements in (kept, Measurements(tmp_path, FACTS)):
        assert list(measurements) == ["old"]
        assert "new" not in measurements
        assert same(measurements["old"], statistics("old"))
    kept.store(statistics("new", seed=3))
    assert same(kept["new"], statistics("new", seed=3))


def failing(function, calls, at):
    def wrapped(*arguments, **more):
        calls.append(function)
        if len(calls) < at:
            return function(*arguments, **more)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return wrapped


def test_a_full_disk_at_any_step_loses_nothing(tmp_path, monkeypatch):
    def run(root):
        kept = Measurements(root, FACTS)
        for seed, name in enumerate(("a", "b")):
            if name not in kept:
                kept.store(statistics(name, seed))
            if kept.text(name, {}) is None:
                kept.keep_text(name, {}, name)
        return kept

    for at in itertools.count(1):
        root, calls = tmp_path / f"cache-{at}", []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing(os.fsync, calls, at))
            for name in ("write_bytes", "replace", "mkdir"):
                patch.setattr(Path, name, failing(getattr(Path, name), calls, at))
            try:
                run(root)
            except OSError as error:
                message = str(error)
            else:
                break
        assert "No space left on device" in message
        assert "run again with --resume" in message
        assert not list(tmp_path.rglob("*.tmp"))
        kept = run(root)
        assert sorted(kept) == ["a", "b"]
        assert all(same(kept[name], statistics(name, seed)) for seed, name in enumerate(("a", "b")))
        assert [kept.text(name, {}) for name in ("a", "b")] == ["a", "b"]
    assert len(calls) > 20


def test_a_system_that_refuses_to_write_more_is_an_error_of_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    kept = Measurements(tmp_path, FACTS)
    kept.store(statistics())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for write in (lambda: kept.store(statistics(seed=1)), lambda: kept.keep_text("a", {}, "x" * 200)):
            with pytest.raises(OSError, match=r"cannot be written .*File too large.*free space.*--resume"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.tmp"))
    assert same(kept[statistics().name], statistics())
    assert kept.text("a", {}) is None


def test_only_old_temporary_files_are_removed_since_another_run_may_be_writing(tmp_path):
    folder = Measurements(tmp_path, FACTS).folder
    for name, age in (("old", 7200), ("new", 0)):
        path = folder / f".{name}.safetensors.12345678.tmp"
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age,) * 2)
    Measurements(tmp_path, FACTS)
    assert [path.name for path in folder.glob(".*.tmp")] == [".new.safetensors.12345678.tmp"]


def write_many(folder, seed):
    torch.set_num_threads(1)  # a forked child waits for ever for the threads that its parent had
    kept = Measurements(folder, FACTS)
    for _ in range(15):
        for index in range(3):
            kept.store(statistics(f"layer.{index}", 10 * index))
            kept.keep_text(f"layer.{index}", {}, f"text {index}")
    os._exit(0 if len(kept) == 3 else 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_runs_that_write_the_same_measurements_at_once_do_not_spoil_them(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, seed)) for seed in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    kept = Measurements(tmp_path, FACTS)
    assert sorted(kept) == ["layer.0", "layer.1", "layer.2"]
    for index in range(3):
        assert same(kept[f"layer.{index}"], statistics(f"layer.{index}", 10 * index))
        assert kept.text(f"layer.{index}", {}) == f"text {index}"
    assert not list(tmp_path.rglob("*.tmp"))


def test_texts_survive_by_name_and_facts(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    assert kept.text("a", {"x": 1}) is None
    kept.keep_text("a", {"x": 1}, "first ä\n")
    kept.keep_text("a", {"x": 2}, "second")
    kept.keep_text("model.layers.0-2", {"x": 1}, "third")
    for measurements in (kept, Measurements(tmp_path, FACTS)):
        assert measurements.text("a", {"x": 1}) == "first ä\n"
        assert measurements.text("a", {"x": 2}) == "second"
        assert measurements.text("model.layers.0-2", {"x": 1}) == "third"
        assert measurements.text("b", {"x": 1}) is None
        assert measurements.text("a", {"x": 3}) is None
    assert Measurements(tmp_path, {**FACTS, "seed": 1}).text("a", {"x": 1}) is None
    # Texts are no statistics.
    assert list(kept) == []
    kept.keep_text("a", {"x": 1}, "anew")
    assert kept.text("a", {"x": 1}) == "anew"


def test_damaged_texts_are_missing(tmp_path):
    kept = Measurements(tmp_path, FACTS)
    text = json.dumps({"energy": 1.25})
    kept.keep_text("a", {}, text)
    path = kept.text_path("a", {})
    whole = path.read_bytes()
    others = (
        seal(None),
        seal([]),
        seal({"name": "a"}),
        seal({"name": "a", "text": 3}),
        seal({"name": "b", "text": text}),
    )
    for data in (*damaged(whole), *others, b"\xff\xfe\xff", b"[" * 100_000, text.encode()):
        path.write_bytes(data)
        assert kept.text("a", {}) is None, data
    kept.keep_text("a", {}, text)
    assert kept.text("a", {}) == text
