"""The checkpoint folder: its description in config.json and the writer of its shards.  See docs/format.md."""

import json
import math
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.base import FORMATS
from cospadi.formats.dictionary import dictionary_layout
from cospadi.formats.factorization import GroupSpec
from cospadi.formats.packing import require_held, require_sharing

FORMAT_VERSION = 1
QUANT_METHOD = "cospadi"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

MAX_SHARD_BYTES = 10**9
"""Of one file, which is put together in memory."""

_KEYS = ("quant_method", "format_version", "library_version", "backend", "experts", "groups")
_MAX_SIDE = 2**24
_MAX_ENTRIES = 2**32


@dataclass(frozen=True)
class CheckpointConfig:
    """What ``quantization_config`` in config.json says.

    Attributes
    ----------
    groups : tuple of GroupSpec
        The compressed layers.
    experts : tuple of str
        Modules of mixture-of-experts weights that were split into linear layers.
    backend : str
        The runtime that is recommended.
    library_version : str
        Of the writer.
    format_version : int
        Of the folder's layout.
    """

    groups: tuple[GroupSpec, ...]
    experts: tuple[str, ...] = ()
    backend: str = "auto"
    library_version: str = ""
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "library_version": self.library_version,
            "backend": self.backend,
            "experts": list(self.experts),
            "groups": [group.to_dict() for group in self.groups],
        }

    @classmethod
    def from_dict(cls, data: Any) -> "CheckpointConfig":
        """Check and read plain JSON values.

        Raises
        ------
        CheckpointError
            Another version or method, unknown or missing keys, wrong types, unknown formats, absurd sizes, or a layer
            that is named twice.
        """
        if not isinstance(data, dict) or data.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(f"quantization_config is not of quant_method {QUANT_METHOD!r}")
        version = data.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version {version!r} is not known here (known: {FORMAT_VERSION}): update cospadi to read it"
            )
        if set(data) != set(_KEYS):
            raise CheckpointError(f"quantization_config has the keys {sorted(data)}, expected {sorted(_KEYS)}")
        for key, kind in (("library_version", str), ("backend", str), ("experts", list), ("groups", list)):
            if type(data[key]) is not kind:
                raise CheckpointError(f"quantization_config: {key} is not a {kind.__name__}")
        groups = tuple(GroupSpec.from_dict(group) for group in data["groups"])
        names: set[str] = set()
        for name in data["experts"]:
            _check_name(name, names)
        for group in groups:
            _check_group(group, names)
        return cls(groups, tuple(data["experts"]), data["backend"], data["library_version"], version)

    def renamed(self, rename: Mapping[str, str]) -> "CheckpointConfig":
        """Give the same description with other module names."""
        groups = tuple(
            replace(group, members=tuple(replace(m, name=rename.get(m.name, m.name)) for m in group.members))
            for group in self.groups
        )
        return replace(self, groups=groups, experts=tuple(rename.get(name, name) for name in self.experts))

    def with_backend(self, backend: str) -> "CheckpointConfig":
        """Give the same description with another recommended backend."""
        return replace(self, backend=backend)


def expected_tensors(group: GroupSpec) -> dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]]:
    """Give every tensor of a group by checkpoint name: its shape and the dtypes it may have."""
    layout = FORMATS.create(group.format).layout
    tensors: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    for local, (shape, dtype) in dictionary_layout(*group.dictionary_shape, group.dictionary_dtype).items():
        tensors[f"{group.name}.{local}"] = (shape, (dtype,))
    for member in group.members:
        rows, columns = group.coefficients_shape(member)
        for local, (shape, dtype) in layout(rows, columns, member.n_stored, group.value_dtype).items():
            tensors[f"{member.name}.{local}"] = (shape, (dtype,))
        if member.bias:
            tensors[f"{member.name}.bias"] = ((member.out_features,), (torch.bfloat16, torch.float16, torch.float32))
    return tensors


def _check_name(name: Any, seen: set[str]) -> None:
    if not isinstance(name, str) or not all(name.split(".")) or not name.isprintable():
        raise CheckpointError(f"quantization_config: {name!r} is not a module name")
    if name in seen:
        raise CheckpointError(f"quantization_config: {name} is named twice")
    seen.add(name)


def _check_group(group: GroupSpec, seen: set[str]) -> None:
    where = f"quantization_config: group {group.name}"
    for member in group.members:
        _check_name(member.name, seen)
    for member in group.members:
        sides = (group.in_features, group.n_atoms, member.out_features)
        entries = group.n_atoms * max(group.in_features, member.out_features)
        if not all(1 <= side <= _MAX_SIDE for side in sides) or entries > _MAX_ENTRIES:
            raise CheckpointError(f"{where}: sizes {sides} of {member.name} are beyond what the format allows")
        if member.n_stored > math.prod(group.coefficients_shape(member)):
            raise CheckpointError(f"{where}: {member.name} stores more coefficients than it has")
    try:
        require_sharing(FORMATS.create(group.format), group.members, group.side)
        require_held(FORMATS.create(group.format), group.dictionary_dtype, group.side)
        expected_tensors(group)
    except UsageError as error:
        raise CheckpointError(f"{where}: {error}") from error


class ShardWriter:
    """Write tensors into shards, module by module, holding at most one shard in memory.

    Files get their names in ``close``, when all of them are complete and on disk; until then, and after an exception,
    the folder holds no file that a reader would take for a checkpoint.

    Parameters
    ----------
    folder : Path
        Made if missing; must not already hold a checkpoint.
    max_shard_bytes : int
        A shard is closed before it would exceed this; a larger module gets a shard of its own.
    """

    def __init__(self, folder: str | Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self._folder = Path(folder)
        self._max = max_shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._total = 0
        self._folder.mkdir(parents=True, exist_ok=True)
        if any(self._folder.glob("*.safetensors")) or (self._folder / INDEX).exists():
            raise UsageError(f"{self._folder} already holds a checkpoint: choose a new folder")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def add(self, module_name: str, tensors: Mapping[str, Tensor]) -> None:
        """Append the tensors of one module, which stay together.

        Parameters
        ----------
        module_name : str
            For error texts.
        tensors : mapping of str to Tensor
            By their full names in the checkpoint.

        Raises
        ------
        ValueError
            A tensor of that name was added before.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and self._pending_bytes + size > self._max:
            self._flush()
        for name, tensor in tensors.items():
            if name in self._names:
                raise ValueError(f"{module_name}: tensor {name} was added before")
            self._names.add(name)
            # A copy where it is a view: safetensors refuses storage that two tensors share.
            whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor = tensor.detach().cpu()
            self._pending[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        self._pending_bytes += size
        self._total += size

    def close(self) -> list[str]:
        """Write the waiting tensors, give the files their names and write the index; return the file names."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        names = []
        for number, (temporary, keys) in enumerate(self._shards, start=1):
            name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            temporary.replace(self._folder / name)
            weight_map.update(dict.fromkeys(keys, name))
            names.append(name)
        self._shards = []
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            temporary = self._folder / f".{INDEX}.tmp"
            temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
            _to_disk(temporary)
            temporary.replace(self._folder / INDEX)
        _to_disk(self._folder)
        return names

    def discard(self) -> None:
        """Delete what was written."""
        for temporary, _ in self._shards:
            temporary.unlink(missing_ok=True)
        self._shards, self._pending = [], {}

    def _flush(self) -> None:
        temporary = self._folder / f".shard-{len(self._shards) + 1:05d}.tmp"
        self._shards.append((temporary, list(self._pending)))
        save_file(self._pending, temporary, metadata={"format": "pt"})
        _as_readable_as_others(temporary)
        _to_disk(temporary)
        self._pending, self._pending_bytes = {}, 0


def _to_disk(path: Path) -> None:
    """Wait until a file or a folder's entries are on disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows offers no handle to flush a folder with
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _as_readable_as_others(path: Path) -> None:
    """Give a file the permissions that new files have here: safetensors writes for its owner alone."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        other = Path(folder) / "new"
        other.touch()
        path.chmod(stat.S_IMODE(other.stat().st_mode))
