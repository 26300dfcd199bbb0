"""The headers of safetensors files and the index over them, checked before memory is taken for a tensor."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cospadi.errors import CheckpointError
from cospadi.files import file_in, parse_object, read_json, shown
from cospadi.formats.checkpoint import INDEX, SINGLE

MAX_HEADER_BYTES = 100_000_000
_MAX_NAME = 1024

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
        header = parse_object(path, file.read(length))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(type(value) is str for value in metadata.values()):
        raise CheckpointError(f"{path}: the header's metadata is not a mapping of texts")
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
        return read_header(file_in(folder, SINGLE))
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(type(v) is str for v in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is not a mapping of tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        for key, stored in read_header(file_in(folder, name)).items():
            if weight_map.get(key) != name:
                raise CheckpointError(f"{stored.file}: tensor {key}: not listed for this file in {INDEX}")
            tensors[key] = stored
    _refuse_missing(folder, weight_map, tensors)
    return tensors


def _refuse_missing(folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, StoredTensor]) -> None:
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        where = folder / weight_map[missing[0]]
        raise CheckpointError(f"{where}: tensor {shown(missing[0])}: missing, though {INDEX} lists it")


def _read_entry(path: Path, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise CheckpointError(f"{path}: tensor {shown(name)}: not a name")
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header's entry is malformed")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: unknown dtype {shown(entry['dtype'])}")
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
