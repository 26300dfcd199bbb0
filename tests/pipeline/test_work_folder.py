"""The records of a run: what counts as one, who may write them, and what happens when writing fails."""

import errno
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch

from cospadi.errors import CheckpointError, UsageError
from cospadi.files.durable import mark_of, seal, unseal, write_durably
from cospadi.files.lock import Lock, holder
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.pipeline.work_folder import WORK, GroupRecord, WorkFolder, changed_fields, check_output

PRINT = {
    "model": "a",
    "calibration": "b",
    "recipe": json.dumps({"ratio": 0.2, "calibration": {"samples": 4}, "include": []}),
    "versions": json.dumps({"torch": "2.12.0", "numpy": "2"}),
}


def record(value=1.0):
    factors = SparseFactorization(torch.full((3, 2), value), {"x": torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, value]])})
    spec, tensors = pack_group(factors, "bitmask", "float32", {"x": torch.ones(3)}, True)
    return GroupRecord(spec, tensors, {"name": "x", "bytes": 20, "a": [1.5, None]})


def same(a, b):
    tensors = set(a.tensors) == set(b.tensors) and all(torch.equal(a.tensors[k], t) for k, t in b.tensors.items())
    return tensors and a.spec == b.spec and a.row == b.row and list(a.row) == list(b.row)


def temporary_files(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture
def folder(tmp_path):
    with WorkFolder(tmp_path / "out", PRINT, resume=False) as made:
        yield made


def paths(folder, index=0):
    tensors = folder.folder / f"group-{index:05d}.safetensors"
    return tensors, mark_of(tensors)


def test_records_survive_exactly(tmp_path):
    with WorkFolder(tmp_path / "out", PRINT, resume=False) as folder:
        assert (folder.load(0), folder.has(0), folder.row(0)) == (None, False, None)
        folder.store(0, record())
        folder.store(7, record(3.0))
    with WorkFolder(tmp_path / "out", PRINT, resume=True) as again:
        assert same(again.load(0), record())
        assert same(again.load(7), record(3.0))
        assert (again.has(0), again.has(1), again.row(7)) == (True, False, record().row)
        assert list(again.marked()) == [0, 7]
        loaded = again.load(0)
        assert torch.equal(unpack_group(loaded.spec, loaded.tensors).joined()[0], torch.tensor([1.0, 2.0, 1.0]))


def test_every_flipped_bit_and_every_shorter_file_counts_as_missing(folder):
    folder.store(0, record())
    for path in paths(folder):
        whole = path.read_bytes()
        damaged = [whole[:n] for n in range(0, len(whole), 7)] + [whole + b" "] * (path.suffix == ".safetensors")
        for place in range(0, len(whole), 3):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << place % 8
            # A change that leaves the JSON values as they were is none: 1.50 for 1.5, or a space.
            if path.suffix == ".safetensors" or json_or_none(flipped) != json.loads(whole):
                damaged.append(bytes(flipped))
        for data in damaged:
            path.write_bytes(data)
            assert folder.load(0) is None, data
            assert not folder.has(0), data
        path.write_bytes(whole)
        assert folder.has(0)
    for path in paths(folder):
        path.unlink()
        assert (folder.load(0), folder.has(0), folder.row(0)) == (None, False, None)
        folder.store(0, record(2.0))
        assert same(folder.load(0), record(2.0))


def json_or_none(data):
    try:
        return json.loads(bytes(data))
    except ValueError:
        return None


def test_the_record_of_another_unit_is_not_taken(folder):
    folder.store(0, record())
    for old, new in zip(paths(folder), paths(folder, 1), strict=True):
        new.write_bytes(old.read_bytes())
    assert not folder.has(1)
    assert folder.load(1) is None


def change(mark, **more):
    mark.update(more)


HOSTILE = {
    "a list": lambda mark: ["x"],
    "nothing": lambda mark: mark.clear(),
    "no row": lambda mark: change(mark, row=3),
    "no group": lambda mark: change(mark, group=None),
    "no checksum": lambda mark: change(mark, sha256=None),
    "two groups": lambda mark: change(mark["group"], groups=mark["group"]["groups"] * 2),
    "no groups": lambda mark: change(mark["group"], groups=[]),
    "unknown format": lambda mark: change(mark["group"]["groups"][0], format="nope"),
    "unknown key": lambda mark: change(mark["group"]["groups"][0], more=1),
    "other sizes": lambda mark: change(mark["group"]["groups"][0], in_features=4),
    "absurd sizes": lambda mark: change(mark["group"]["groups"][0], in_features=2**62),
    "negative": lambda mark: change(mark["group"]["groups"][0], n_atoms=-1),
    "members are no list": lambda mark: change(mark["group"]["groups"][0], members={"a": 1}),
    "member is a number": lambda mark: change(mark["group"]["groups"][0], members=[5]),
}


@pytest.mark.parametrize("shape", HOSTILE)
def test_a_mark_of_another_shape_counts_as_missing_though_its_checksum_is_right(folder, shape):
    folder.store(0, record())
    path = paths(folder)[1]
    mark = unseal(path)
    path.write_bytes(seal(HOSTILE[shape](mark) or mark))
    assert (folder.load(0), folder.has(0), folder.row(0)) == (None, False, None)


@pytest.mark.parametrize("payload", [b"", b"\xff" * 40, b"\x02" + bytes(7) + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_tensors_that_do_not_parse_count_as_missing_though_their_checksum_is_right(folder, payload):
    import hashlib

    folder.store(0, record())
    tensors, path = paths(folder)
    tensors.write_bytes(payload)
    mark = unseal(path)
    path.write_bytes(seal(mark | {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}))
    assert (folder.load(0), folder.has(0), folder.row(0)) == (None, False, None)


def test_notes_survive_and_damaged_ones_are_missing(tmp_path):
    plan = [{"name": "x", "kind": "factors", "cost": 1.25}]
    with WorkFolder(tmp_path / "out", PRINT, resume=False) as folder:
        assert folder.noted("plan") is None
        folder.note("plan", plan)
        folder.note("command", "cospadi-cli compress ä")
        folder.note("plan", plan * 2)
    with WorkFolder(tmp_path / "out", PRINT, resume=True) as folder:
        assert folder.noted("plan") == plan * 2
        assert folder.noted("command") == "cospadi-cli compress ä"
        path = folder.folder / "note-plan.json"
        whole = path.read_bytes()
        for data in (
            b"",
            whole[:-1],
            b"[" * 100_000,
            b"\xff\xfe",
            b"3",
            whole.replace(b"25", b"26"),
        ):
            path.write_bytes(data)
            assert folder.noted("plan") is None


def test_another_run_does_not_continue_this_one_and_says_why(tmp_path):
    WorkFolder(tmp_path / "out", PRINT, resume=False).close()

    def refused(**change):
        with pytest.raises(UsageError) as caught:
            WorkFolder(tmp_path / "out", PRINT | change, resume=True)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "an interrupted run with another model: repeat" in refused(model="c")
    recipe = json.dumps({"ratio": 0.3, "calibration": {"samples": 4}, "include": ["*q*"], "new": True})
    text = refused(recipe=recipe, versions=json.dumps({"torch": "2.13.0"}))
    assert "another recipe and versions" in text
    assert '(recipe: ratio 0.2 -> 0.3, include [] -> ["*q*"], new (none) -> true; versions: ' in text
    assert "torch 2.12.0 -> 2.13.0, numpy 2 -> (none))" in text
    assert "another recipe:" in refused(recipe="[" * 100_000)
    assert "another more:" in refused(more="x")
    long = json.dumps({"ratio": 0.2, "calibration": {"samples": 4}, "include": ["x" * 1000]})
    assert len(refused(recipe=long)) < 500
    WorkFolder(tmp_path / "out", PRINT, resume=True).close()


def test_values_that_differ_only_at_the_end_of_a_long_text_are_told_apart():
    assert changed_fields(json.dumps({"a": "x" * 99 + "y", "b": 1}), json.dumps({"a": "x" * 99 + "z", "b": 1}))
    assert not changed_fields("{", '{"a": 1}')


def test_a_resumed_run_adopts_the_number_of_threads(tmp_path):
    out = tmp_path / "out"
    for asked, resume, expected in ((3, False, 3), (None, True, 3), (3, True, 3)):
        with WorkFolder(out, PRINT, resume, threads=asked) as folder:
            assert folder.threads == expected
    with pytest.raises(UsageError, match=r"began with 3 threads.*ask for 3 threads or for no number"):
        WorkFolder(out, PRINT, resume=True, threads=2)
    with WorkFolder(tmp_path / "new", PRINT, resume=False) as folder:
        assert folder.threads == torch.get_num_threads()


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"sha256": 1, "content": 2}', seal({"threads": 1}).decode()])
def test_records_without_a_sound_fingerprint_are_not_trusted(tmp_path, text):
    with WorkFolder(tmp_path / "out", PRINT, resume=False) as folder:
        folder.store(0, record())
    path = folder.folder / "fingerprint.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=r"missing or damaged.*delete"):
        WorkFolder(tmp_path / "out", PRINT, resume=True)


def test_a_run_that_died_before_its_first_file_starts_afresh(tmp_path):
    (tmp_path / "out" / WORK).mkdir(parents=True)
    with WorkFolder(tmp_path / "out", PRINT, resume=True) as folder:
        assert folder.threads > 0


def test_output_folders_in_use_are_refused(tmp_path):
    check_output(tmp_path / "new", resume=False)
    check_output(tmp_path / "new" / "deeper", resume=True)
    check_output(tmp_path, resume=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    for resume in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            check_output(tmp_path, resume)
        for below in ("file", "file/below"):
            with pytest.raises(UsageError, match="is a file"):
                check_output(tmp_path / below, resume)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a model"):
        check_output(tmp_path, resume=True)
    WorkFolder(tmp_path / "out", PRINT, resume=False).close()
    with pytest.raises(UsageError, match="add --resume"):
        check_output(tmp_path / "out", resume=False)
    check_output(tmp_path / "out", resume=True)


def test_links_are_followed_but_not_into_nothing(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    with WorkFolder(tmp_path / "link", PRINT, resume=False) as folder:
        folder.store(0, record())
        assert same(folder.load(0), record())
        folder.remove()
    assert list((tmp_path / "there").iterdir()) == []
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    for out in ("dangling", "dangling/below", "circle"):
        with pytest.raises(UsageError, match=r"link to .*, which does not exist"):
            check_output(tmp_path / out, resume=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK).symlink_to(tmp_path / "there")
    with pytest.raises(UsageError, match="is a link"):
        check_output(tmp_path / "out", resume=True)


@pytest.fixture
def powerless():
    """A folder that all may enter, and the rights of a user who owns nothing."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        else:
            place.chmod(0o555)
        try:
            yield place
        finally:
            if root:
                os.seteuid(0)
            place.chmod(0o755)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of POSIX")
def test_an_output_that_cannot_be_written_is_refused_before_any_work(powerless):
    for out in (powerless, powerless / "new", powerless / "new" / "deeper"):
        with pytest.raises(UsageError, match=r"cannot be used \(Permission denied\): choose one that can be written"):
            check_output(out, resume=False)


def test_an_output_on_a_read_only_file_system_is_refused(tmp_path, monkeypatch):
    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UsageError, match="Read-only file system"):
        check_output(tmp_path / "out", resume=False)
    with pytest.raises(UsageError, match="File name too long"):
        check_output(tmp_path / ("x" * 300), resume=False)


def test_left_over_temporary_files_are_removed_at_the_next_start(tmp_path):
    with WorkFolder(tmp_path / "out", PRINT, resume=False) as folder:
        folder.store(3, record())
        assert not temporary_files(tmp_path)
        (folder.folder / "measurements" / "facts").mkdir(parents=True)
    for place in (folder.folder.parent, folder.folder, folder.folder / "measurements" / "facts"):
        (place / ".group-00004.safetensors.12345678.tmp").write_bytes(b"half")
    with WorkFolder(tmp_path / "out", PRINT, resume=True) as again:
        assert not temporary_files(tmp_path)
        assert same(again.load(3), record())


# The lock


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    import socket

    with WorkFolder(tmp_path / "out", PRINT, resume=False) as first:
        who = re.escape(f"in use by process {os.getpid()} on host {socket.gethostname()}: wait")
        for resume in (False, True):
            with pytest.raises(UsageError, match=who):
                check_output(tmp_path / "out", resume)
            with pytest.raises(UsageError, match=who):
                WorkFolder(tmp_path / "out", PRINT, resume)
        with pytest.raises(UsageError, match=who):  # of two that start at once
            Lock(first.folder / "lock")
        assert holder(first.folder / "lock").pid == os.getpid()
        first.store(0, record())
    assert holder(first.folder / "lock") is None
    assert holder(tmp_path / "nothing") is None
    WorkFolder(tmp_path / "out", PRINT, resume=True).close()


def test_a_refused_or_failed_start_leaves_the_lock_free(tmp_path):
    WorkFolder(tmp_path / "out", PRINT, resume=False).close()
    with pytest.raises(UsageError, match="another model"):
        WorkFolder(tmp_path / "out", PRINT | {"model": "c"}, resume=True)
    WorkFolder(tmp_path / "out", PRINT, resume=True).close()


# Writing fails


class Failing:
    """Make the n-th write, flush or rename fail, and all that follow as on a full disk."""

    def __init__(self, monkeypatch, at):
        self.calls, self.at = 0, at
        monkeypatch.setattr(os, "fsync", self.wrap(os.fsync))
        for name in ("write_bytes", "replace", "mkdir"):
            monkeypatch.setattr(Path, name, self.wrap(getattr(Path, name), half=name == "write_bytes"))
        import cospadi.pipeline.records as records

        monkeypatch.setattr(records, "save_file", self.wrap(records.save_file, half=True, place=1))

    def wrap(self, function, half=False, place=0):
        def wrapped(*arguments, **more):
            self.calls += 1
            if self.calls < self.at:
                return function(*arguments, **more)
            if half:
                with open(arguments[place], "wb") as file:
                    file.write(b"half of what was to")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return wrapped


def a_run(out, resume):
    with WorkFolder(out, PRINT, resume, threads=1) as folder:
        folder.note("plan", [1, 2])
        for index in range(2):
            if not folder.has(index):
                folder.store(index, record(float(index)))
        return {path.name: path.read_bytes() for path in sorted(folder.folder.iterdir()) if path.name != "lock"}


def test_a_full_disk_at_any_write_loses_nothing_and_says_what_to_do(tmp_path, monkeypatch):
    whole, at = a_run(tmp_path / "whole", False), 0
    while True:
        at += 1
        out = tmp_path / f"out-{at}"
        with monkeypatch.context() as patch:
            failing = Failing(patch, at)
            try:
                a_run(out, False)
            except OSError as error:
                message = str(error)
            else:
                break
        assert "cannot be written (No space left on device)" in message
        assert "free space" in message
        assert "run again with --resume" in message
        assert "\n" not in message
        assert not temporary_files(tmp_path)
        assert a_run(out, True) == whole
    assert failing.calls > 20  # each of 6 files is written, flushed, renamed, and its folder flushed


def test_a_system_that_really_refuses_to_write_more_leaves_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    with WorkFolder(tmp_path / "out", PRINT, resume=False) as folder:
        folder.store(0, record())
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            for write in (lambda: folder.store(0, record(2.0)), lambda: folder.note("plan", "x" * 200)):
                with pytest.raises(OSError, match=r"File too large.*--resume"):
                    write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not temporary_files(tmp_path)
        assert same(folder.load(0), record())
        assert folder.noted("plan") is None


def test_what_cannot_be_deleted_at_the_end_is_an_error_of_one_line(folder, monkeypatch):
    folder.store(0, record())
    monkeypatch.setattr("shutil.rmtree", lambda path: write_durably(path / "missing" / "file", b""))
    with pytest.raises(OSError, match="cannot be written"):
        folder.remove()
