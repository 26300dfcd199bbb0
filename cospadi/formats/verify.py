"""Read a checkpoint folder that may be damaged or hostile: everything is checked before memory is taken for it.

What is checked is listed in docs/format.md, section 7.  Nothing here runs code from the folder.
"""

import json
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.formats.base import FORMATS
from cospadi.formats.checkpoint import INDEX, SINGLE, CheckpointConfig, expected_tensors
from cospadi.formats.packing import check_count, packed_member, packed_owner

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100_000_000

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class StoredTensor:
    """What a header says of one tensor, checked against its file."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a folder.

    Raises
    ------
    CheckpointError
        It is missing, leaves the folder, is larger than 64 MiB or is not a JSON object.
    """
    path = _file_in(folder, name)
    if path.stat().st_size > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES} bytes")
    return _parse(path, path.read_bytes())


def read_config(folder: str | Path) -> CheckpointConfig:
    """Read the description of a checkpoint from its config.json.

    Raises
    ------
    CheckpointError
        See ``read_json`` and ``CheckpointConfig.from_dict``.
    """
    folder = Path(folder)
    try:
        return CheckpointConfig.from_dict(read_json(folder, "config.json").get("quantization_config"))
    except CheckpointError as error:
        where = str(folder / "config.json")
        raise CheckpointError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a safetensors file.

    Raises
    ------
    CheckpointError
        It is truncated or malformed, or its tensors do not fill the file exactly.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path}: the header's length {length} does not fit a file of {size} bytes")
        header = _parse(path, file.read(length))
    header.pop("__metadata__", None)
    tensors, ranges = {}, []
    for name, entry in header.items():
        tensors[name], begin, end = _read_entry(path, name, entry)
        if end > size - 8 - length:
            raise CheckpointError(f"{path}: tensor {name}: ends at byte {end} of {size - 8 - length} bytes of data")
        ranges.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise CheckpointError(f"{path}: tensor {name}: data at byte {begin}, expected {position}")
        position = end
    if position != size - 8 - length:
        raise CheckpointError(f"{path}: holds {size - 8 - length} bytes of data, its header describes {position}")
    return tensors


def read_headers(folder: str | Path) -> dict[str, StoredTensor]:
    """Read the headers of all shards of a folder, and its index if there is one.

    Raises
    ------
    CheckpointError
        A file is missing, leaves the folder, is malformed or disagrees with the index.
    """
    folder = Path(folder)
    has_index, has_single = (folder / INDEX).exists(), (folder / SINGLE).exists()
    if has_index and has_single:
        raise CheckpointError(f"{folder}: has both {SINGLE} and {INDEX}: it is not clear which one counts")
    if not has_index:
        return read_header(_file_in(folder, SINGLE))
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(type(v) is str for v in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is not a mapping of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, stored in read_header(_file_in(folder, name)).items():
            if weight_map.get(key) != name:
                raise CheckpointError(f"{stored.file}: tensor {key}: not listed for this file in {INDEX}")
            tensors[key] = stored
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{folder / weight_map[missing[0]]}: tensor {missing[0]}: missing, though {INDEX} lists it"
        )
    return tensors


def check_headers(config: CheckpointConfig, tensors: Mapping[str, StoredTensor]) -> None:
    """Compare headers with what the description of the groups implies.

    Raises
    ------
    CheckpointError
        A tensor is missing or unknown, or has another shape or dtype.
    """
    expected = {key: what for group in config.groups for key, what in expected_tensors(group).items()}
    members = {member.name for group in config.groups for member in group.members}
    for key, (shape, dtypes) in expected.items():
        if key not in tensors:
            raise CheckpointError(f"tensor {key}: missing from the checkpoint")
        stored = tensors[key]
        if stored.shape != shape or stored.dtype not in dtypes:
            found = f"{stored.shape} {stored.dtype}, expected {shape} {' or '.join(map(str, dtypes))}"
            raise CheckpointError(f"{stored.file}: tensor {key}: {found}".replace("torch.", ""))
    for key, stored in tensors.items():
        if key not in expected and key.rpartition(".")[0] in members:
            raise CheckpointError(f"{stored.file}: tensor {key}: does not belong to a compressed layer")


def verify_checkpoint(folder: str | Path, contents: bool = True) -> CheckpointConfig:
    """Check a whole checkpoint.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    contents : bool
        Also read the tensors of the compressed layers; False stops at the headers.

    Returns
    -------
    CheckpointConfig
        Its description.

    Raises
    ------
    CheckpointError
        On the first fault; names the file and the tensor.
    """
    config = read_config(folder)
    tensors = read_headers(folder)
    check_headers(config, tensors)
    if contents:
        with _Reader(tensors) as reader:
            for group in config.groups:
                codec = FORMATS.create(group.format)
                keys = list(expected_tensors(group))
                for key in keys:
                    reader.check_finite(key)
                owned = {key: reader[key] for key in keys if key.startswith(f"{group.name}.dictionary")}
                try:
                    packed_owner(group, owned)
                except CheckpointError as error:
                    raise CheckpointError(f"{tensors[keys[0]].file}: tensor {error}") from error
                for member in group.members:
                    own = {key: reader[key] for key in keys if key.rpartition(".")[0] == member.name}
                    try:
                        packed = packed_member(group, member, own)
                        codec.check(packed)
                        check_count(member, packed)
                    except CheckpointError as error:
                        where = tensors[next(iter(own), keys[0])].file
                        raise CheckpointError(f"{where}: tensor {member.name}.{error}") from error
    return config


def read_tensors(folder: str | Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Read tensors of a checkpoint by name; all of them if no names are given.

    Raises
    ------
    CheckpointError
        A file is damaged or a name unknown.
    """
    tensors = read_headers(folder)
    with _Reader(tensors) as reader:
        return {name: reader[name] for name in (tensors if names is None else names)}


def stays_inside(folder: Path, path: Path) -> bool:
    """Tell whether a path of a folder, links followed, is in the folder, or in the hub cache's store of its files."""
    root = folder.resolve()
    # The hub's cache holds snapshots/<revision>/<file> as links to blobs/<hash> beside snapshots.
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return any(path.resolve().is_relative_to(r) for r in roots)


class _Reader:
    """Tensors by name from files that are opened once."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "_Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise CheckpointError(f"tensor {name}: missing from the checkpoint")
        path = self._tensors[name].file
        try:
            if path not in self._files:
                self._files[path] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error

    def check_finite(self, name: str) -> None:
        tensor = self[name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self._tensors[name].file}: tensor {name}: holds NaN or infinity")


def _read_entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header's entry is malformed")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {entry['dtype']!r}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers in (shape, offsets):
        if (
            not isinstance(numbers, list)
            or len(numbers) > 8
            or not all(type(n) is int and 0 <= n < 2**63 for n in numbers)
        ):
            raise CheckpointError(f"{where}: shape or offsets are not short lists of numbers")
    size = dtype.itemsize
    for side in shape:
        size *= side
    if len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise CheckpointError(f"{where}: offsets {offsets} do not hold {entry['dtype']} of shape {shape}")
    return StoredTensor(path, tuple(shape), dtype), offsets[0], offsets[1]


def _file_in(folder: Path, name: str) -> Path:
    """Give the path of a file of the folder, refusing names and links that leave it."""
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: file name {name!r} leaves the folder")
    path = folder / name
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: missing") from error
    if not stays_inside(folder, path):
        raise CheckpointError(f"{path}: is a link that leaves the folder")
    if not stat.S_ISREG(target.stat().st_mode):
        raise CheckpointError(f"{path}: is not a file")
    return path


def _parse(path: Path, data: bytes) -> dict[str, Any]:
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
    return parsed
