"""Read a checkpoint folder that may be damaged or hostile: everything is checked before memory is taken for it.

What is checked is listed in docs/format.md, section 7.  Nothing here runs code from the folder.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cospadi.errors import CheckpointError
from cospadi.files import one_line, read_json
from cospadi.formats.base import FORMATS
from cospadi.formats.checkpoint import CheckpointConfig, expected_tensors
from cospadi.formats.checksums import check_checksums
from cospadi.formats.headers import StoredTensor, read_headers
from cospadi.formats.packing import check_count, packed_member, packed_owner


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
        text = str(error)
        raise CheckpointError(text if text.startswith(where) else f"{where}: {one_line(text)}") from error


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


def verify_checkpoint(folder: str | Path, contents: bool = True, checksums: bool = True) -> CheckpointConfig:
    """Check a whole checkpoint.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    contents : bool
        Also read the tensors of the compressed layers; False stops at the headers.
    checksums : bool
        First compare the files with SHA256SUMS, where the folder has one, which reads all of them.

    Returns
    -------
    CheckpointConfig
        Its description.

    Raises
    ------
    CheckpointError
        On the first fault; names the file and the tensor.
    """
    if checksums:
        check_checksums(folder)
    config = read_config(folder)
    tensors = read_headers(folder)
    check_headers(config, tensors)
    if contents:
        with _Reader(tensors) as reader:
            reader.open_files()
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
            return self._opened(path).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error

    def open_files(self) -> None:
        """Open all files, which lets the library that will read them check them in its way, too."""
        for path in sorted({stored.file for stored in self._tensors.values()}):
            try:
                self._opened(path)
            except SafetensorError as error:
                raise CheckpointError(f"{path}: {error}") from error

    def _opened(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(safe_open(path, framework="pt", backend="pread"))
        return self._files[path]

    def check_finite(self, name: str) -> None:
        tensor = self[name]
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{self._tensors[name].file}: tensor {name}: holds NaN or infinity")
