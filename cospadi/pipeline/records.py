"""Records of a run, from which it resumes: finished groups, and notes on the plan.

A folder of records holds, for each finished group, ``group-NNNNN.safetensors`` with its tensors and its mark
``group-NNNNN.json`` with its description and its row of the report; and one sealed ``note-KEY.json`` for each note.
Whatever is damaged counts as missing.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file
from torch import Tensor

from cospadi.errors import CheckpointError, UsageError
from cospadi.files import is_sound, read_mark, seal, store_payload, unseal, write_durably
from cospadi.formats import CheckpointConfig, GroupSpec, check_headers, read_header
from cospadi.reporting import GroupRow


@dataclass(frozen=True)
class GroupRecord:
    """One finished group: its description, its tensors by checkpoint name and its row of the report."""

    spec: GroupSpec
    tensors: dict[str, Tensor]
    row: GroupRow


class Records:
    """The records of a folder, by the index of the group in the plan.

    Parameters
    ----------
    folder : Path
        Only read, until something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, index: int) -> GroupRecord | None:
        """Give a finished group, or None when there is no record or it is damaged (it must then be solved again)."""
        found = self._describe(index)
        try:
            data = self._path(index).read_bytes()
        except OSError:
            return None
        if found is None or found[2] != hashlib.sha256(data).hexdigest():
            return None
        return GroupRecord(found[0], load(data), found[1])

    def store(self, index: int, record: GroupRecord) -> None:
        """Write a finished group durably.

        Raises
        ------
        StorageError
            It cannot be written; there is no record then.
        """
        facts = {"index": index, "group": CheckpointConfig((record.spec,)).to_dict(), "row": record.row}
        store_payload(self._path(index), lambda path: save_file(record.tensors, path), facts)

    def has(self, index: int) -> bool:
        """Tell whether a group is finished and its record sound; reads it once through."""
        found = self._describe(index)
        return found is not None and is_sound(self._path(index), {"sha256": found[2]})

    def row(self, index: int) -> GroupRow | None:
        """Give a finished group's row of the report, reading the header of its tensors but not their checksum."""
        found = self._describe(index)
        return None if found is None else found[1]

    def spec(self, index: int) -> GroupSpec | None:
        """Give a finished group's description; see ``row``."""
        found = self._describe(index)
        return None if found is None else found[0]

    def marked(self) -> Iterator[int]:
        """Give the indices of all groups that have a mark, damaged ones included."""
        for path in sorted(self.folder.glob("group-*.json")):
            number = path.stem.removeprefix("group-")
            if number.isdecimal():
                yield int(number)

    def note(self, key: str, value: Any) -> None:
        """Keep JSON values under a key, durably; those of before are replaced.

        Raises
        ------
        StorageError
            They cannot be written; those of before are still there.
        """
        write_durably(self._note_path(key), seal(value))

    def noted(self, key: str) -> Any:
        """Give what was kept under a key; None if there is nothing, or it is damaged."""
        return unseal(self._note_path(key))

    def _describe(self, index: int) -> tuple[GroupSpec, GroupRow, str] | None:
        """Give a group's description, row and checksum, if the payload's header is what the description implies."""
        path = self._path(index)
        mark = read_mark(path)
        if mark is None or mark.get("index") != index or not isinstance(mark.get("row"), dict):
            return None
        try:
            config = CheckpointConfig.from_dict(mark.get("group"))
            check_headers(config, read_header(path))
        # A sound checksum says that these are the bytes of the writer, who may be another version of cospadi.
        except (CheckpointError, UsageError, OSError):
            return None
        return (config.groups[0], mark["row"], mark["sha256"]) if len(config.groups) == 1 else None

    def _path(self, index: int) -> Path:
        return self.folder / f"group-{index:05d}.safetensors"

    def _note_path(self, key: str) -> Path:
        return self.folder / f"note-{key}.json"
