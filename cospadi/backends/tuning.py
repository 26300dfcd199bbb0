"""Thresholds that ``cospadi-cli tune`` measured on this machine, kept in the user's cache folder.

The number of tokens up to which one kernel is faster than another depends on the processor, its threads and torch.
Each threshold is stored with all of them, and used only where they are the same.
"""

import json
import logging
import os
import platform
import tempfile
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import UsageError
from cospadi.files import cache_folder

OPTIONS = {"cpu": ("max_tokens",), "cuda": ("project_tokens", "combine_tokens")}
"""The options of each backend that are measured: numbers of tokens."""

_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tuned:
    """The thresholds that were measured for one backend, device and dtype.

    Attributes
    ----------
    backend : str
        A key of ``OPTIONS``.
    device : str
        Name of the processor or GPU.
    threads : int
        Of torch; 0 on a GPU, where they do not matter.
    dtype : str
        Of the input, such as ``bfloat16``.
    torch, cospadi : str
        Versions.
    options : dict of str to int
        Some of the backend's ``OPTIONS``.
    """

    backend: str
    device: str
    threads: int
    dtype: str
    torch: str
    cospadi: str
    options: dict[str, int]

    @property
    def key(self) -> tuple[Any, ...]:
        """All fields that must be equal for the options to apply."""
        return tuple(getattr(self, field.name) for field in fields(self) if field.name != "options")


def tuned(backend: str, device: torch.device, dtype: torch.dtype, options: dict[str, int]) -> Tuned:
    """Give options together with this machine, the threads of torch and the versions."""
    try:
        own = version("cospadi")
    except PackageNotFoundError:  # a source tree that is not installed
        own = "0+unknown"
    return Tuned(
        backend,
        device_name(device),
        torch.get_num_threads() if device.type == "cpu" else 0,
        str(dtype).removeprefix("torch."),
        torch.__version__,
        own,
        dict(options),
    )


def options_for(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, int]:
    """Give the options that were measured for a backend here; empty where nothing was.

    Parameters
    ----------
    backend : str
        Registry name.
    device, dtype
        Of the input.
    """
    if backend not in OPTIONS:
        return {}
    known = stored_tuned()
    if not known:  # the usual case, which needs no name of the device
        return {}
    wanted = tuned(backend, device, dtype, {}).key
    return next((dict(entry.options) for entry in known if entry.key == wanted), {})


def stored_tuned() -> tuple[Tuned, ...]:
    """Give all stored thresholds; none, with a warning in the log, if the file is damaged."""
    try:
        path = tuning_file()
        state = path.stat()
        return _read(path, state.st_mtime_ns, state.st_size)
    except FileNotFoundError:
        return ()
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home folder
        logger.warning("measured thresholds cannot be read, the shipped ones are taken: %s", error)
        return ()


def store_tuned(entries: list[Tuned]) -> Path:
    """Store measured thresholds; they replace those for the same places.

    Returns
    -------
    Path
        The file; it is replaced as a whole.

    Raises
    ------
    UsageError
        The cache folder cannot be written.
    """
    replaced = {entry.key for entry in entries}
    kept = [entry for entry in stored_tuned() if entry.key not in replaced]
    data = {"version": _VERSION, "entries": [asdict(entry) for entry in (*kept, *entries)]}
    path = tuning_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(data, indent=1) + "\n")
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(
            f"the cache folder {path.parent} cannot be written ({error.strerror}): name another in COSPADI_CACHE"
        ) from error
    return path


def reset_tuned() -> bool:
    """Remove all stored thresholds; tells whether there were any."""
    try:
        tuning_file().unlink()
    except FileNotFoundError:
        return False
    return True


def tuning_file() -> Path:
    """Give the path of the file with the thresholds."""
    return cache_folder() / "tuning.json"


def device_name(device: torch.device) -> str:
    """Name a GPU or the processor of this machine."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


@lru_cache(maxsize=1)
def processor_name() -> str:
    """Give the model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@lru_cache(maxsize=4)
def _read(path: Path, modified: int, size: int) -> tuple[Tuned, ...]:
    """Read one state of the file; the cache makes sure that each is parsed and warned of once."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']!r}, expected {_VERSION}")
        return tuple(_checked(entry) for entry in data["entries"])
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s is damaged (%s): the shipped thresholds are taken; 'cospadi-cli tune' measures them again", path, error
        )
        return ()


def _checked(entry: Any) -> Tuned:
    """Check one entry, because an unknown option would make every model fail."""
    found = Tuned(**entry)
    for field in fields(found):
        if field.name != "options" and type(getattr(found, field.name)) is not field.type:
            raise ValueError(f"{field.name}={getattr(found, field.name)!r}")
    if found.backend not in OPTIONS or not isinstance(found.options, dict):
        raise ValueError(f"backend {found.backend!r} with options {found.options!r}")
    for name, value in found.options.items():
        if name not in OPTIONS[found.backend] or type(value) is not int or not 0 <= value < 2**31:
            raise ValueError(f"option {name}={value!r} of backend {found.backend!r}")
    return found
