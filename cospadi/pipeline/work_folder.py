"""The work folder of a run: who may write it, and what its records depend on.

Every finished group is on disk before the next one starts.  ``fingerprint.json`` says what the result depends on, so
that no other run goes on with the records; ``lock`` is held for as long as the run lasts.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import CheckpointError, UsageError
from cospadi.files import Lock, holder, make_folder, remove_left_overs, seal, storing, unseal, write_durably
from cospadi.formats import INDEX, SINGLE
from cospadi.pipeline.records import GroupRecord, Records

WORK = ".cospadi-work"
FINISHED = f"{WORK}-finished"


class WorkFolder(Records):
    """The records inside the output folder of one run, for this run alone until it is closed.

    Parameters
    ----------
    out : Path
        Output folder.
    fingerprint : dict of str to str
        What the result depends on: model, calibration tokens, recipe, versions; the latter two as JSON texts.
    resume : bool
        Continue what an interrupted run left; starts afresh where there is nothing.
    threads : int, optional
        Threads of each task, on which the last bits of a result depend.  By default those of the interrupted run, or
        for a new run those of torch.

    Attributes
    ----------
    folder : Path
        Of the records.
    threads : int
        To be used.

    Raises
    ------
    UsageError
        The folder holds something else, an interrupted run that cannot or must not be continued, or a run that is
        going on; or it cannot be written.
    CheckpointError
        It is damaged.
    StorageError
        Writing failed.
    """

    def __init__(self, out: Path, fingerprint: dict[str, str], resume: bool, threads: int | None = None) -> None:
        super().__init__(out / WORK)
        check_output(out, resume)
        make_folder(self.folder)
        self._lock = Lock(self.folder / "lock")
        try:
            remove_left_overs(out)
            self.threads = self._claim(out, fingerprint, threads)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another run have the folder."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the records, when the checkpoint is complete, and close the folder.

        Raises
        ------
        StorageError
            They cannot be deleted.
        """
        finished = self.folder.with_name(FINISHED)
        if sys.platform == "win32":
            self.close()  # a folder with an open file cannot be renamed there
        with storing(finished):
            # Renamed first: a run that dies while it deletes has finished, and must not look interrupted.
            self.folder.rename(finished)
            shutil.rmtree(finished)
        self.close()

    def _claim(self, out: Path, fingerprint: dict[str, str], threads: int | None) -> int:
        """Write the fingerprint, or compare it with the one that is there; give the number of threads."""
        path = self.folder / "fingerprint.json"
        if not path.exists() and next(self.marked(), None) is None:
            threads = threads or torch.get_num_threads()
            write_durably(path, seal({"fingerprint": fingerprint, "threads": threads}))
            return threads
        begun = read_fingerprint(self.folder)
        if begun is None:
            raise CheckpointError(f"{path} is missing or damaged, so nothing here can be trusted: delete {self.folder}")
        before, began_with = begun
        changed = {key: before.get(key) for key in {**before, **fingerprint} if before.get(key) != fingerprint.get(key)}
        if changed:
            details = {key: changed_fields(old, fingerprint.get(key)) for key, old in changed.items()}
            listed = "; ".join(f"{key}: {text}" for key, text in details.items() if text)
            raise UsageError(
                f"{out} holds an interrupted run with another {' and '.join(changed)}{listed and f' ({listed})'}: "
                "repeat the command that began it, or choose another output folder"
            )
        if threads not in (None, began_with):
            raise UsageError(
                f"{out} holds a run that began with {began_with} threads, on which the last bits of its result depend: "
                f"ask for {began_with} threads or for no number, or choose another output folder"
            )
        return began_with


def read_fingerprint(folder: Path) -> tuple[dict[str, str], int] | None:
    """Give the fingerprint and the number of threads of a work folder; None if they are missing or damaged."""
    begun = unseal(folder / "fingerprint.json")
    if not isinstance(begun, dict) or set(begun) != {"fingerprint", "threads"} or type(begun["threads"]) is not int:
        return None
    texts = begun["fingerprint"]
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        return None
    return texts, begun["threads"]


def changed_fields(before: str | None, after: str | None) -> str:
    """Say which fields of two JSON objects differ, with both values; nothing for texts that are no JSON objects."""
    old, new = fields(before), fields(after)
    if not old or not new:
        return ""
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {_short(old.get(key, '(none)'))} -> {_short(new.get(key, '(none)'))}" for key in changed)


def fields(text: str | None) -> dict[str, str]:
    """Give the leaves of a JSON object as texts by dotted names; none for anything else."""
    try:
        data = json.loads(text or "")
        return dict(_leaves("", data)) if isinstance(data, dict) else {}
    except (ValueError, RecursionError):
        return {}


def is_finished(out: Path) -> bool:
    """Tell whether a run has ended well in a folder, even if it died before it had deleted its records."""
    return (out / "run.json").is_file() and (out / "report.json").is_file() and not (out / WORK).exists()


def clear_finished(out: Path) -> None:
    """Delete what a run that died after its end has left of its records."""
    with storing(out / FINISHED):
        shutil.rmtree(out / FINISHED, ignore_errors=not (out / FINISHED).exists())


def check_output(out: Path, resume: bool) -> None:
    """Refuse an output folder that is in use or cannot be written, before any work is done.

    Raises
    ------
    UsageError
        It is a file, cannot be written, lies in a model's folder, or holds something other than an interrupted run to
        resume.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UsageError(f"output {out} is a file: choose a new folder")
        if out.is_dir() and any(out.iterdir()) and not (resume and is_finished(out)):
            _check_contents(out, resume)
        _check_writable(out)
        _check_place(out)
    except OSError as error:
        raise UsageError(
            f"output folder {out} cannot be used ({error.strerror or error}): choose one that can be written"
        ) from error


def _check_contents(out: Path, resume: bool) -> None:
    if not (out / WORK).is_dir():
        holds = "already holds a model" if (out / "config.json").is_file() else "is not empty"
        raise UsageError(f"output folder {out} {holds}: choose a new folder, or delete it")
    if (out / WORK).is_symlink():
        raise UsageError(f"{out / WORK} is a link, which no run of cospadi makes: delete it")
    who = holder(out / WORK / "lock")
    if who is not None:
        raise UsageError(f"output folder {out} is in use by {who}: wait until it ends, or end it")
    if not resume:
        raise UsageError(f"output folder {out} holds an interrupted run: add --resume to continue it, or delete it")


def _check_place(out: Path) -> None:
    """Refuse a place in a model's folder, which would be copied and published with that model."""
    for above in out.resolve().parents:
        if (above / "config.json").is_file() and any((above / name).is_file() for name in (SINGLE, INDEX)):
            raise UsageError(f"output {out} lies in the folder of a model, {above}: choose a folder outside it")


def _check_writable(out: Path) -> None:
    """Write a nameless file where the folder is or will be: permissions alone do not tell, least of all the root's."""
    place = out
    while not place.exists():
        if place.is_symlink():
            raise UsageError(f"output {out}: {place} is a link to {os.readlink(place)}, which does not exist")
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"output {out}: {place} is a file: choose a new folder")
    with tempfile.TemporaryFile(dir=place):
        pass


def _leaves(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        return [leaf for key, below in value.items() for leaf in _leaves(f"{name}.{key}" if name else str(key), below)]
    return [(name, value if isinstance(value, str) else json.dumps(value))]


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


__all__ = [
    "WORK",
    "GroupRecord",
    "WorkFolder",
    "changed_fields",
    "check_output",
    "fields",
    "read_fingerprint",
]
