"""Statistics and profiles kept in a folder, so that a second ratio of the same model costs neither again.

A folder holds one subfolder for each set of facts that the statistics depend on (model, tokens, labels), with
``facts.json`` and a subfolder per distinct input, in which one safetensors file is named by its checksum: it appears
whole, and several runs may write at once.  Profiles lie beside them, by what they depend on.  Whatever is damaged
counts as missing.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from cospadi.calibration import SourceStatistics
from cospadi.errors import CheckpointError
from cospadi.files import (
    checksum,
    file_name,
    make_folder,
    put_in_place,
    remove_left_overs,
    seal,
    storing,
    temporary_for,
    unseal,
    write_durably,
)

FACTS = "facts.json"
_FORGOTTEN = 3600.0
"""Seconds after which a temporary file in a shared folder belongs to no running process."""


def digest(facts: Mapping[str, object]) -> str:
    """Give a short name for a set of facts."""
    return hashlib.sha256(_text_of(facts).encode()).hexdigest()[:20]


class Measurements(Mapping[str, SourceStatistics]):
    """The statistics of a model's inputs, read from disk one at a time, and texts that were derived from them.

    Parameters
    ----------
    root : Path
        Of all measurements; made if missing.
    facts : mapping of str to object
        What the statistics depend on; others' files are left alone.

    Attributes
    ----------
    folder : Path
        Of these measurements.

    Raises
    ------
    StorageError
        The folder cannot be written.
    """

    def __init__(self, root: Path, facts: Mapping[str, object]) -> None:
        self.facts = dict(facts)
        self.folder = root / digest(facts)
        self._last: tuple[str, SourceStatistics] | None = None
        # By name, the file whose checksum was found right, and what tells whether it is still the same.
        self._checked: dict[str, tuple[Path, tuple[int, int, int] | None]] = {}
        make_folder(self.folder)
        remove_left_overs(self.folder, older_than=_FORGOTTEN)
        if unseal(self.folder / FACTS) is None:
            write_durably(self.folder / FACTS, seal(json.loads(_text_of(facts))))

    def store(self, statistics: SourceStatistics) -> None:
        """Write the statistics of one input durably, in place of those of before.

        Raises
        ------
        StorageError
            They cannot be written; those of before are still there.
        """
        self._last = None
        folder = self.folder / file_name(statistics.name)
        make_folder(folder)
        # Only those that are there now: of two runs that write at once, each might else delete what the other wrote.
        before = payloads(self.folder, statistics.name)
        with temporary_for(folder / "statistics") as temporary:
            statistics.save(temporary)
            path = folder / f"{checksum(temporary)}.safetensors"
            put_in_place(temporary, path)
            for other in before:
                if other != path:
                    other.unlink(missing_ok=True)

    def __getitem__(self, source: str) -> SourceStatistics:
        """Read the statistics of one input.

        Raises
        ------
        KeyError
            There are none, or they are damaged.
        CheckpointError
            They turned bad after they had been found sound.
        """
        if self._last is not None and self._last[0] == source:
            return self._last[1]
        self._last = None  # frees it before the next is read
        was_sound = source in self._checked
        path = self._find(source)
        if path is None and was_sound:
            raise CheckpointError(
                f"the statistics of {source} in {self.folder} are damaged now: run again with --resume"
            )
        if path is None:
            raise KeyError(source)
        try:
            self._last = source, SourceStatistics.load(path)
        except CheckpointError as error:
            with storing(path):
                path.unlink(missing_ok=True)
            raise CheckpointError(f"{error}; it was deleted: run again with --resume") from error
        return self._last[1]

    def __contains__(self, source: object) -> bool:
        """Tell whether there is a sound record; it is read only the first time, and when it was replaced."""
        return isinstance(source, str) and self._find(source) is not None

    def __iter__(self) -> Iterator[str]:
        names = {name_in(path) for path in payloads(self.folder)} - {None}
        return (name for name in sorted(map(str, names)) if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _find(self, source: str) -> Path | None:
        """Give the path of a sound record; of several, which runs that write at once may leave, always the same."""
        if source in self._checked:
            path, state = self._checked[source]
            if _state(path) == state:
                return path
        for path in payloads(self.folder, source):
            state = _state(path)
            if is_record(path, source):
                self._checked[source] = path, state
                return path
        return None

    def text(self, name: str, facts: Mapping[str, object]) -> str | None:
        """Give a text that was kept under this name for these facts; None if there is none, or it is damaged."""
        kept = unseal(self.text_path(name, facts))
        if not isinstance(kept, dict) or kept.get("name") != name or not isinstance(kept.get("text"), str):
            return None
        return str(kept["text"])

    def keep_text(self, name: str, facts: Mapping[str, object], text: str) -> None:
        """Keep a text under a name, durably.

        Raises
        ------
        StorageError
            It cannot be written; the text of before is still there.
        """
        path = self.text_path(name, facts)
        make_folder(path.parent)
        write_durably(path, seal({"name": name, "text": text}))

    def text_path(self, name: str, facts: Mapping[str, object]) -> Path:
        """Give where a text is kept."""
        return self.folder / f"profile-{digest(facts)}" / f"{file_name(name)}.json"


def payloads(folder: Path, source: str | None = None) -> list[Path]:
    """Give the files in which the statistics of one input, or of all, are or should be, in the order of their names."""
    return sorted(folder.glob(f"{'*' if source is None else file_name(source)}/{'[0-9a-f]' * 64}.safetensors"))


def is_record(path: Path, source: str, contents: bool = True) -> bool:
    """Tell whether a file holds the statistics of an input; without ``contents`` the header alone is looked at."""
    try:
        return name_in(path) == source and (not contents or checksum(path) == path.stem)
    except OSError:
        return False


def name_in(path: Path) -> str | None:
    """Give the name in the header of a file of statistics; None if it is something else."""
    try:
        with safe_open(path, "pt") as file:
            name = json.loads(file.metadata()["description"])["name"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _state(path: Path) -> tuple[int, int, int] | None:
    """Give what tells a file from others of that path; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _text_of(facts: Mapping[str, object]) -> str:
    return json.dumps(facts, sort_keys=True, default=str)
