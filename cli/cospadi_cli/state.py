"""What a run has done and what is left, or what a cache keeps, told from the records alone."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_STAGES = {"calibrating": "inputs", "profiling": "groups", "correcting": "layer kinds", "solving": "units"}
"""What each stage of a run goes through."""


@dataclass
class Stage:
    """How far a stage is; ``total`` and ``seconds`` are None where they are not known."""

    name: str
    of: str
    done: int = 0
    total: int | None = None
    left: list[str] = field(default_factory=list)
    seconds: float | None = None


@dataclass
class Found:
    """Files that were looked at."""

    bytes: int = 0
    last_activity: float | None = None
    damaged: list[str] = field(default_factory=list)

    def look_at(self, paths: Iterable[Path]) -> None:
        """Count files that are there."""
        for path in paths:
            try:
                state = path.stat()
            except FileNotFoundError:
                continue  # a run that goes on replaces its files
            self.bytes += state.st_size
            self.last_activity = max(self.last_activity or 0.0, state.st_mtime)


def read_status(path: Path, verify: bool = False) -> dict[str, Any]:
    """Give the state of a run or of a cache as plain values.

    Parameters
    ----------
    path : Path
        Output folder of a run, the work folder in it, a finished checkpoint, or a folder for ``--cache``.
    verify : bool
        Read every record and compare its checksum; else only sizes and headers.

    Raises
    ------
    UsageError
        It is none of these.
    """
    from cospadi.errors import UsageError
    from cospadi.files import unseal
    from cospadi.pipeline import FACTS, WORK

    if (path / WORK).is_dir():
        return _read_run(path, path / WORK, verify)
    if path.is_dir() and path.resolve().name == WORK:
        return _read_run(path, path, verify)
    if _is_checkpoint(path):
        return _read_finished(path)
    parts = sorted(part for part in path.glob("*") if isinstance(unseal(part / FACTS), dict))
    if parts:
        kept = [_read_measurements(part, verify) for part in parts]
        return {"path": str(path), "state": "cache", "measurements": kept}
    raise UsageError(
        f"{path} holds no run: give the output folder of a run, its folder {WORK}, or the folder of --cache"
    )


def _read_run(path: Path, folder: Path, verify: bool) -> dict[str, Any]:
    from cospadi.files import holder
    from cospadi.pipeline import Records, read_fingerprint

    records, found = Records(folder), Found()
    begun = read_fingerprint(folder)
    if begun is None and (folder / "fingerprint.json").exists():
        found.damaged.append("fingerprint.json")
    measured = _measured_in(records)
    stages = [
        _inputs(measured, _names(records.noted("sources")), found, verify),
        _texts("profiling", measured, _names(records.noted("profiles")), found),
        _texts("correcting", measured, _names(records.noted("corrections")), found),
        _units(records, found, verify),
    ]
    spent = records.noted("seconds")
    for stage in stages:
        seconds = spent.get(stage.name) if isinstance(spent, dict) else None
        stage.seconds = float(seconds) if isinstance(seconds, int | float) else None
    found.look_at([*folder.glob("group-*"), *folder.glob("note-*.json"), folder / "fingerprint.json"])
    who, model = holder(folder / "lock"), records.noted("model")
    return {
        "path": str(path),
        "state": "interrupted" if who is None else "running",
        "process": None if who is None else {"pid": who.pid, "host": who.host},
        "model": model if isinstance(model, str) else None,
        "recipe": None if begun is None else _recipe(begun[0].get("recipe")),
        "threads": None if begun is None else begun[1],
        "stages": [asdict(stage) for stage in stages if stage.total is None or stage.total > 0],
        **asdict(found),
        "command": _to_go_on(records.noted("command")),
    }


def _measured_in(records: Any) -> Path | None:
    """Give the folder of the run's measurements: the noted one, or the only one in the work folder."""
    noted = records.noted("measurements")
    if isinstance(noted, str):
        return Path(noted)
    inside = list((records.folder / "measurements").glob("*/"))
    return inside[0] if len(inside) == 1 else None


def _inputs(folder: Path | None, names: list[str] | None, found: Found, verify: bool) -> Stage:
    from cospadi.pipeline import is_record, name_in, payloads

    stage = Stage("calibrating", _STAGES["calibrating"], total=None if names is None else len(names))
    if folder is None:
        return stage
    found.look_at(payloads(folder))
    if names is None:
        names = sorted({name_in(path) or path.parent.name for path in payloads(folder)})
    for name in names:
        paths = payloads(folder, name)
        if any(is_record(path, name, contents=verify) for path in paths):
            stage.done += 1
            continue
        stage.left.append(name)
        if paths:
            found.damaged.append(name)
    return stage


def _texts(name: str, folder: Path | None, paths: list[str] | None, found: Found) -> Stage:
    from cospadi.files import unseal

    stage = Stage(name, _STAGES[name], total=None if paths is None else len(paths))
    if folder is None:
        return stage
    for text in paths or []:
        path = folder / text
        found.look_at([path])
        if isinstance(unseal(path), dict):
            stage.done += 1
            continue
        stage.left.append(path.stem)
        if path.exists():
            found.damaged.append(path.stem)
    return stage


def _units(records: Any, found: Found, verify: bool) -> Stage:
    plan, marked = records.noted("plan"), set(records.marked())
    names = {index: f"unit {index}" for index in marked}
    if isinstance(plan, list):
        named = [unit.get("name") if isinstance(unit, dict) else None for unit in plan]
        names = {index: name if isinstance(name, str) else f"unit {index}" for index, name in enumerate(named)}
    stage = Stage("solving", _STAGES["solving"], total=len(names) if isinstance(plan, list) else None)
    for index, name in names.items():
        if records.has(index) if verify else records.row(index) is not None:
            stage.done += 1
            continue
        stage.left.append(name)
        if index in marked:
            found.damaged.append(name)
    return stage


def _read_finished(path: Path) -> dict[str, Any]:
    """Give what run.json, which may be missing, says of a finished run."""
    try:
        run = json.loads((path / "run.json").read_bytes())
        spent, began = dict(run["stages"]), float(run["began"])
        seconds = {str(name): float(value) for name, value in spent.items()} | {"in all": float(run["seconds"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {"path": str(path), "state": "finished", "began": None, "seconds": {}}
    return {"path": str(path), "state": "finished", "began": began, "seconds": seconds}


def _read_measurements(folder: Path, verify: bool) -> dict[str, Any]:
    from cospadi.files import unseal
    from cospadi.pipeline import FACTS

    found = Found()
    stage = _inputs(folder, None, found, verify)
    texts = sorted(folder.glob("profile-*/*.json"))
    found.look_at([*texts, folder / FACTS])
    sound = [path for path in texts if isinstance(unseal(path), dict)]
    found.damaged += [path.stem for path in texts if path not in sound]
    facts = unseal(folder / FACTS)
    return {"folder": folder.name, "facts": facts, "inputs": stage.done, "texts": len(sound), **asdict(found)}


def _is_checkpoint(path: Path) -> bool:
    from cospadi.formats import QUANT_METHOD

    try:
        return bool(
            json.loads((path / "config.json").read_bytes())["quantization_config"]["quant_method"] == QUANT_METHOD
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _recipe(text: str | None) -> dict[str, str]:
    """Give the ratio and every field of a recipe that is not as by default."""
    from cospadi.pipeline import fields
    from cospadi.recipe import CompressionConfig

    usual = fields(json.dumps(CompressionConfig().to_dict()))
    return {key: value for key, value in fields(text).items() if key == "ratio" or usual.get(key) != value}


def _to_go_on(command: Any) -> str | None:
    if not isinstance(command, str):
        return None
    return command if "--resume" in command.split() else f"{command} --resume"


def _names(noted: Any) -> list[str] | None:
    """Give a list of texts; None for whatever else a note may hold."""
    return noted if isinstance(noted, list) and all(isinstance(name, str) for name in noted) else None
