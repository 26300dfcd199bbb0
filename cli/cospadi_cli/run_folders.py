"""Reading the state of a run or of a cache from the records in its folder."""

import json
from pathlib import Path
from typing import Any

from cospadi_cli.run_state import CacheState, Files, FinishedRun, KeptMeasurements, RunState, Stage

_STAGES = {"calibrating": "inputs", "profiling": "groups", "correcting": "layer kinds", "solving": "groups"}
"""What each stage of a run counts."""


def read_folder(path: Path, verify: bool = False) -> RunState | FinishedRun | CacheState:
    """Give the state of a run or of a cache.

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
        return CacheState(str(path), [_read_measurements(part, verify) for part in parts])
    raise UsageError(
        f"{path} holds no run: give the output folder of a run, its folder {WORK}, or the folder of --cache"
    )


def _read_run(path: Path, folder: Path, verify: bool) -> RunState:
    from cospadi.files import holder
    from cospadi.pipeline import Records, read_fingerprint

    records, files = Records(folder), Files()
    begun = read_fingerprint(folder)
    if begun is None and (folder / "fingerprint.json").exists():
        files.damaged.append("fingerprint.json")
    measurements = _measurements_of(records)
    stages = [
        _inputs(measurements, _names(records.noted("sources")), files, verify),
        _texts("profiling", measurements, _names(records.noted("profiles")), files),
        _texts("correcting", measurements, _names(records.noted("corrections")), files),
        _groups(records, files, verify),
    ]
    spent = records.noted("seconds")
    for stage in stages:
        seconds = spent.get(stage.name) if isinstance(spent, dict) else None
        stage.seconds = float(seconds) if isinstance(seconds, int | float) else None
    files.add([*folder.glob("group-*"), *folder.glob("note-*.json"), folder / "fingerprint.json"])
    process, model = holder(folder / "lock"), records.noted("model")
    return RunState(
        path=str(path),
        process=None if process is None else {"pid": process.pid, "host": process.host},
        model=model if isinstance(model, str) else None,
        recipe=None if begun is None else _changed_fields(begun[0].get("recipe")),
        threads=None if begun is None else begun[1],
        stages=[stage for stage in stages if stage.total is None or stage.total > 0],
        files=files,
        command=_resuming(records.noted("command")),
    )


def _measurements_of(records: Any) -> Path | None:
    """Give the folder of the run's measurements: the noted one, or the only one in the work folder."""
    noted = records.noted("measurements")
    if isinstance(noted, str):
        return Path(noted)
    inside = list((records.folder / "measurements").glob("*/"))
    return inside[0] if len(inside) == 1 else None


def _inputs(folder: Path | None, names: list[str] | None, files: Files, verify: bool) -> Stage:
    from cospadi.pipeline import is_record, name_in, payloads

    stage = Stage("calibrating", _STAGES["calibrating"], total=None if names is None else len(names))
    if folder is None:
        return stage
    files.add(payloads(folder))
    if names is None:
        names = sorted({name_in(path) or path.parent.name for path in payloads(folder)})
    for name in names:
        paths = payloads(folder, name)
        if any(is_record(path, name, contents=verify) for path in paths):
            stage.done += 1
            continue
        stage.left.append(name)
        if paths:
            files.damaged.append(name)
    return stage


def _texts(name: str, folder: Path | None, paths: list[str] | None, files: Files) -> Stage:
    from cospadi.files import unseal

    stage = Stage(name, _STAGES[name], total=None if paths is None else len(paths))
    if folder is None:
        return stage
    for text in paths or []:
        path = folder / text
        files.add([path])
        if isinstance(unseal(path), dict):
            stage.done += 1
            continue
        stage.left.append(path.stem)
        if path.exists():
            files.damaged.append(path.stem)
    return stage


def _groups(records: Any, files: Files, verify: bool) -> Stage:
    plan, marked = records.noted("plan"), set(records.marked())
    names = {index: f"group {index}" for index in marked}
    if isinstance(plan, list):
        named = [group.get("name") if isinstance(group, dict) else None for group in plan]
        names = {index: name if isinstance(name, str) else f"group {index}" for index, name in enumerate(named)}
    stage = Stage("solving", _STAGES["solving"], total=len(names) if isinstance(plan, list) else None)
    for index, name in names.items():
        if records.has(index) if verify else records.row(index) is not None:
            stage.done += 1
            continue
        stage.left.append(name)
        if index in marked:
            files.damaged.append(name)
    return stage


def _read_finished(path: Path) -> FinishedRun:
    """Read run.json, which may be missing or damaged."""
    try:
        run = json.loads((path / "run.json").read_bytes())
        spent, began = dict(run["stages"]), float(run["began"])
        seconds = {str(name): float(value) for name, value in spent.items()} | {"in all": float(run["seconds"])}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return FinishedRun(str(path), None, {})
    return FinishedRun(str(path), began, seconds)


def _read_measurements(folder: Path, verify: bool) -> KeptMeasurements:
    from cospadi.files import unseal
    from cospadi.pipeline import FACTS

    files = Files()
    stage = _inputs(folder, None, files, verify)
    texts = sorted(folder.glob("profile-*/*.json"))
    files.add([*texts, folder / FACTS])
    sound = [path for path in texts if isinstance(unseal(path), dict)]
    files.damaged += [path.stem for path in texts if path not in sound]
    return KeptMeasurements(folder.name, unseal(folder / FACTS), stage.done, len(sound), files)


def _is_checkpoint(path: Path) -> bool:
    from cospadi.formats import QUANT_METHOD

    try:
        return bool(
            json.loads((path / "config.json").read_bytes())["quantization_config"]["quant_method"] == QUANT_METHOD
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _changed_fields(recipe: str | None) -> dict[str, str]:
    """Give the ratio and every field of a recipe that differs from the default."""
    from cospadi.pipeline import fields
    from cospadi.recipe import CompressionConfig

    usual = fields(json.dumps(CompressionConfig().to_dict()))
    return {key: value for key, value in fields(recipe).items() if key == "ratio" or usual.get(key) != value}


def _resuming(command: Any) -> str | None:
    """Give a noted command line with --resume; None if there is none."""
    if not isinstance(command, str):
        return None
    return command if "--resume" in command.split() else f"{command} --resume"


def _names(noted: Any) -> list[str] | None:
    """Give a note that is a list of texts; None for anything else."""
    return noted if isinstance(noted, list) and all(isinstance(name, str) for name in noted) else None
