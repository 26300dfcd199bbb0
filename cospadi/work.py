"""The records of a run: every finished group is on disk before the next one starts.

A work folder holds ``fingerprint.json`` and, for each finished group, ``group-NNNNN.safetensors`` with its tensors and
then ``group-NNNNN.json`` with its description and the checksum of the tensors.  The second file is the mark that the
record is complete.  Every file is written under a temporary name, flushed to disk and renamed.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from cospadi.errors import UsageError
from cospadi.factorization import GroupSpec

WORK = ".cospadi-work"


@dataclass(frozen=True)
class GroupRecord:
    """One finished group: its description, its tensors by checkpoint name and its row of the report."""

    spec: GroupSpec
    tensors: dict[str, Tensor]
    row: dict[str, Any]


class WorkFolder:
    """The records inside the output folder of one run.

    Parameters
    ----------
    out : Path
        Output folder.
    fingerprint : dict of str to str
        What the result depends on: model, calibration tokens, recipe, versions.
    resume : bool
        Continue what an interrupted run left; starts afresh where there is nothing.

    Raises
    ------
    UsageError
        The folder holds something else, or an interrupted run that cannot or must not be continued.
    """

    def __init__(self, out: Path, fingerprint: dict[str, str], resume: bool) -> None:
        self.folder = out / WORK
        check_output(out, resume)
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / "fingerprint.json"
        if mark.is_file():
            before = _read_json(mark)
            changed = [key for key in fingerprint if before.get(key) != fingerprint[key]]
            if changed:
                raise UsageError(
                    f"{out} holds an interrupted run with another {' and '.join(changed)}: "
                    "repeat the command that began it, or choose another output folder"
                )
        else:
            write_durably(mark, json.dumps(fingerprint, indent=1).encode())

    def load(self, index: int) -> GroupRecord | None:
        """Give a finished group, or None when there is no record or it is damaged (then it is made again)."""
        try:
            note = _read_json(self._path(index, "json"))
            data = self._path(index, "safetensors").read_bytes()
        except FileNotFoundError:
            return None
        if note.get("sha256") != hashlib.sha256(data).hexdigest():
            return None
        return GroupRecord(GroupSpec.from_dict(note["spec"]), load(data), note["row"])

    def store(self, index: int, record: GroupRecord) -> None:
        """Write a finished group durably."""
        data = save(record.tensors)
        note = {"spec": record.spec.to_dict(), "row": record.row, "sha256": hashlib.sha256(data).hexdigest()}
        write_durably(self._path(index, "safetensors"), data)
        write_durably(self._path(index, "json"), json.dumps(note).encode())

    def remove(self) -> None:
        """Delete the records, when the checkpoint is complete."""
        # Renamed first: a run that dies while it deletes has finished, and must not look interrupted.
        shutil.rmtree(self.folder.rename(self.folder.with_name(f"{WORK}-finished")))

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"group-{index:05d}.{suffix}"


def check_output(out: Path, resume: bool) -> None:
    """Refuse an output folder that is in use, before any work is done.

    Raises
    ------
    UsageError
        It is a file, or holds something other than an interrupted run to resume.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out} is a file: choose a new folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / WORK).is_dir():
        holds = "already holds a model" if (out / "config.json").is_file() else "is not empty"
        raise UsageError(f"output folder {out} {holds}: choose a new folder, or delete it")
    if not resume:
        raise UsageError(f"output folder {out} holds an interrupted run: add --resume to continue it, or delete it")


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, and be sure that it is on disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    put_in_place(temporary, path)


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a finished file its name, and be sure that it is on disk under it."""
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping; one that a crash of the disk has damaged counts as empty."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
