"""Write the checkpoint folder of a compressed model."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from cospadi.errors import CheckpointError
from cospadi.formats import CHECKSUMS, CheckpointConfig, ShardWriter, write_checksums
from cospadi.models import OpenModel
from cospadi.pipeline.records import GroupRecord, Records
from cospadi.reporting import versions


def write_checkpoint(
    out: Path, source: OpenModel, folder: Records, count: int, experts: Sequence[str], backend: str
) -> int:
    """Write a checkpoint folder: the factors of the compressed layers and every other tensor as it was.

    One record and one shard are in memory at a time.

    Parameters
    ----------
    out : Path
        Output folder; what an interrupted write left in it is replaced.
    source : OpenModel
        The dense model.
    folder : Records
        The compressed layers.
    count : int
        How many records there are.
    experts : sequence of str
        Expert modules that were split into linear layers.
    backend : str
        Runtime to recommend.

    Returns
    -------
    int
        Bytes of all tensors that are not factors.
    """
    specs = {index: _sound(folder, folder.spec(index)) for index in range(count)}
    indices = {member.name: index for index, spec in specs.items() for member in spec.members}
    for left_over in (
        *out.glob("*.safetensors"),
        *out.glob("*.safetensors.index.json"),
        *out.glob(".*.tmp"),
        out / CHECKSUMS,
    ):
        left_over.unlink(missing_ok=True)
    writer, seen, other_bytes = ShardWriter(out), set(), 0
    last: tuple[int, GroupRecord] | None = None
    for name, module in source.model.named_modules():
        if name in indices:
            index = indices[name]
            if last is None or last[0] != index:
                last = None  # frees it before the next is read
                last = index, _sound(folder, folder.load(index))
            tensors = {key: t for key, t in last[1].tensors.items() if key.rpartition(".")[0] == name}
            if f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"].to(source.dtypes[f"{name}.bias"])
                other_bytes += tensors[f"{name}.bias"].nbytes
        else:
            own = []
            skip = module._non_persistent_buffers_set
            for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if key not in skip and id(tensor) not in seen:  # a tied tensor is written once, where it appears first
                    seen.add(id(tensor))
                    own.append(f"{name}.{key}" if name else key)
            tensors = {key: tensor.cpu().contiguous() for key, tensor in source.weights.read(own).items()}
            other_bytes += sum(t.nbytes for t in tensors.values())
        if tensors:
            writer.add(name, tensors)
    writer.close()
    version = versions()["cospadi"]
    settings = CheckpointConfig(
        groups=tuple(specs.values()), experts=tuple(experts), backend=backend, library_version=version
    )
    _write_settings(out, source, settings)
    write_checksums(out)
    return other_bytes


T = TypeVar("T")


def _sound(folder: Records, found: T | None) -> T:
    if found is None:
        raise CheckpointError(f"a record has vanished from {folder.folder} or cannot be read back: run with --resume")
    return found


def _write_settings(out: Path, source: OpenModel, settings: CheckpointConfig) -> None:
    """Write config, generation config, tokenizer."""
    config = copy.deepcopy(source.model.config)
    config.dtype = source.dtype
    config.quantization_config = settings.to_dict()
    config.architectures = [type(source.model).__name__]
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(out)
    generation = getattr(source.model, "generation_config", None)
    if generation is not None and source.model.can_generate():
        generation.save_pretrained(out)
    config.save_pretrained(out)
