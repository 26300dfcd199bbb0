import json

import pytest
import torch

from cospadi.errors import UsageError
from cospadi.factorization import GroupSpec, MemberSpec
from cospadi.work import WORK, GroupRecord, WorkFolder, check_output

PRINT = {"model": "a", "recipe": "b"}


def record(value=1.0):
    spec = GroupSpec(2, 1, (MemberSpec("x", 3, 3),), "dense", "float32", "float32", True, "input")
    return GroupRecord(spec, {"x.values": torch.full((3, 1), value), "x.dictionary": torch.ones(1, 2)}, {"bytes": 20})


def test_records_survive_exactly(tmp_path):
    folder = WorkFolder(tmp_path / "out", PRINT, resume=False)
    assert folder.load(0) is None
    folder.store(0, record())
    again = WorkFolder(tmp_path / "out", PRINT, resume=True).load(0)
    assert again.spec == record().spec
    assert again.row == record().row
    assert all(torch.equal(again.tensors[k], t) for k, t in record().tensors.items())


@pytest.mark.parametrize("damage", ["flip", "truncate", "no note", "half a note", "no tensors"])
def test_a_damaged_record_counts_as_missing(tmp_path, damage):
    folder = WorkFolder(tmp_path / "out", PRINT, resume=False)
    folder.store(0, record())
    tensors, note = (folder.folder / f"group-00000.{end}" for end in ("safetensors", "json"))
    if damage == "flip":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(data)
    elif damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "half a note":
        note.write_text(note.read_text()[:40])
    else:
        (note if damage == "no note" else tensors).unlink()
    assert folder.load(0) is None
    folder.store(0, record(2.0))
    assert float(folder.load(0).tensors["x.values"][0]) == 2.0


def test_another_run_does_not_continue_this_one(tmp_path):
    WorkFolder(tmp_path / "out", PRINT, resume=False)
    with pytest.raises(UsageError, match="another recipe"):
        WorkFolder(tmp_path / "out", {**PRINT, "recipe": "c"}, resume=True)


def test_output_folders_in_use_are_refused(tmp_path):
    check_output(tmp_path / "new", resume=False)
    check_output(tmp_path / "new", resume=True)
    check_output(tmp_path, resume=False)
    (tmp_path / "file").write_text("x")
    for resume in (False, True):
        with pytest.raises(UsageError, match="not empty"):
            check_output(tmp_path, resume)
        with pytest.raises(UsageError, match="is a file"):
            check_output(tmp_path / "file", resume)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="already holds a model"):
        check_output(tmp_path, resume=True)
    WorkFolder(tmp_path / "out", PRINT, resume=False)
    with pytest.raises(UsageError, match="add --resume"):
        check_output(tmp_path / "out", resume=False)
    check_output(tmp_path / "out", resume=True)


def test_no_temporary_file_is_left(tmp_path):
    folder = WorkFolder(tmp_path / "out", PRINT, resume=False)
    folder.store(3, record())
    assert not list((tmp_path / "out" / WORK).glob("*.tmp"))
    assert json.loads((folder.folder / "fingerprint.json").read_text()) == PRINT
