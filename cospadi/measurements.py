"""What calibration and profiling found, kept in a folder: a second ratio of the same model costs neither again.

A folder holds one subfolder for each thing that the statistics depend on (model, tokens, labels), with one safetensors
file per distinct input; profiles lie beside them, by what they depend on.  Files appear whole or not at all.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from cospadi.calibration.gradients import SourceStatistics
from cospadi.errors import CheckpointError
from cospadi.work import put_in_place, write_durably


def digest(facts: Mapping[str, object]) -> str:
    """Give a short name for a set of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:20]


class Measurements(Mapping[str, SourceStatistics]):
    """The statistics of a model's inputs, read from disk one at a time, and texts that were derived from them.

    Parameters
    ----------
    folder : Path
        Of all measurements; made if missing.
    facts : mapping of str to object
        What the statistics depend on; others' files are left alone.
    """

    def __init__(self, folder: Path, facts: Mapping[str, object]) -> None:
        self.facts = dict(facts)
        self._folder = folder / digest(facts)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._last: tuple[str, SourceStatistics] | None = None

    def store(self, statistics: SourceStatistics) -> None:
        """Write the statistics of one input."""
        path = self._path(statistics.name)
        temporary = path.with_suffix(".tmp")
        statistics.save(temporary)
        put_in_place(temporary, path)
        self._last = None

    def __getitem__(self, source: str) -> SourceStatistics:
        """Read the statistics of one input.

        Raises
        ------
        KeyError
            There are none.
        CheckpointError
            The file is damaged.
        """
        if self._last is None or self._last[0] != source:
            if not self._path(source).is_file():
                raise KeyError(source)
            self._last = source, SourceStatistics.load(self._path(source))
        return self._last[1]

    def __contains__(self, source: object) -> bool:
        return isinstance(source, str) and self._path(source).is_file()

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def text(self, name: str, facts: Mapping[str, object]) -> str | None:
        """Give a text that was kept under this name for these facts; None if there is none."""
        path = self._text_path(name, facts)
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}): delete it") from error

    def keep_text(self, name: str, facts: Mapping[str, object], text: str) -> None:
        """Keep a text under a name."""
        path = self._text_path(name, facts)
        path.parent.mkdir(exist_ok=True)
        write_durably(path, text.encode())

    def _path(self, source: str) -> Path:
        return self._folder / f"{source}.safetensors"

    def _text_path(self, name: str, facts: Mapping[str, object]) -> Path:
        return self._folder / f"profile-{digest(facts)}" / f"{name}.json"
