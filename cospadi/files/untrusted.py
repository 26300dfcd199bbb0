"""Files of a folder that may be hostile: names that stay inside it, and JSON of bounded size and depth."""

import json
import stat
from pathlib import Path
from typing import Any

from cospadi.errors import CheckpointError

MAX_JSON_BYTES = 64 * 2**20
_MAX_DEPTH = 32
_SHOWN = 120
_MOST_CHARACTERS = 600


def file_in(folder: Path, name: str) -> Path:
    """Give the path of a file of the folder, refusing names and links that leave it.

    Raises
    ------
    CheckpointError
        It is missing, is not a plain file or lies elsewhere.
    """
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: file name {shown(name)} leaves the folder")
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {shown(name)} is missing") from error
    except ValueError as error:  # a lone surrogate, which no file name can hold
        raise CheckpointError(f"{folder}: {shown(name)} is no file name") from error
    if not stays_inside(folder, path):
        raise CheckpointError(f"{path}: is a link that leaves the folder")
    if not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{path}: is not a file")
    return path


def stays_inside(folder: Path, path: Path) -> bool:
    """Tell whether a path of a folder, links followed, is in the folder, or in the hub cache's store of its files."""
    root = folder.resolve()
    # The hub's cache holds snapshots/<revision>/<file> as links to blobs/<hash> beside snapshots.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(path.resolve().is_relative_to(r) for r in roots)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a folder.

    Raises
    ------
    CheckpointError
        It is missing, leaves the folder, is larger than 64 MiB or is not a JSON object as ``parse_object`` takes it.
    """
    path = file_in(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    return parse_object(path, path.read_bytes())


def parse_object(path: Path, data: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises
    ------
    CheckpointError
        It is no JSON in UTF-8, no object, nested more than 32 deep, or has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    if _is_deep(parsed):
        raise CheckpointError(f"{path}: nested more than {_MAX_DEPTH} deep")
    return parsed


def shown(value: Any) -> str:
    """Give a value as it may stand in an error line: escaped, and cut where it is long."""
    text = ascii(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(text: str) -> str:
    """Give an error's text on one line, without characters that a terminal would obey, and cut where it is long."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text[: 2 * _MOST_CHARACTERS].split()))
    return line if len(line) <= _MOST_CHARACTERS else f"{line[:_MOST_CHARACTERS]}..."


def _is_deep(value: Any) -> bool:
    """Tell whether lists and mappings are nested deeper than functions that recurse into them can bear."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        items = (child for one in level for child in (one.values() if isinstance(one, dict) else one))
        level = [item for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True
