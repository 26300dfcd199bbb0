"""Write the checkpoint folder of a compressed model."""

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path

from cospadi.formats.checkpoint import CheckpointConfig, ShardWriter
from cospadi.models import OpenModel
from cospadi.report import versions
from cospadi.work import GroupRecord


def write_checkpoint(
    out: Path, source: OpenModel, groups: Iterable[GroupRecord], experts: Sequence[str], backend: str
) -> int:
    """Write a checkpoint folder: the factors of the compressed layers and every other tensor as it was.

    Parameters
    ----------
    out : Path
        Output folder; what an interrupted write left in it is replaced.
    source : OpenModel
        The dense model.
    groups : iterable of GroupRecord
        The compressed layers.
    experts : sequence of str
        Expert modules that were split into linear layers.
    backend : str
        Runtime to recommend.

    Returns
    -------
    int
        Bytes of all tensors that are not factors.
    """
    records = {member.name: record for record in groups for member in record.spec.members}
    for left_over in (*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json"), *out.glob(".*.tmp")):
        left_over.unlink()
    writer, seen, other_bytes = ShardWriter(out), set(), 0
    for name, module in source.model.named_modules():
        if name in records:
            tensors = {key: t for key, t in records[name].tensors.items() if key.rpartition(".")[0] == name}
            if f"{name}.bias" in tensors:
                tensors[f"{name}.bias"] = tensors[f"{name}.bias"].to(source.dtypes[f"{name}.bias"])
                other_bytes += tensors[f"{name}.bias"].nbytes
        else:
            tensors = {}
            skip = module._non_persistent_buffers_set
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in own:
                if key not in skip and id(tensor) not in seen:  # a tied tensor is written once, where it appears first
                    seen.add(id(tensor))
                    full = f"{name}.{key}" if name else key
                    tensors[full] = tensor.detach().cpu().to(source.dtypes.get(full, source.dtype)).contiguous()
            other_bytes += sum(t.nbytes for t in tensors.values())
        if tensors:
            writer.add(name, tensors)
    writer.close()
    specs = tuple(dict.fromkeys(record.spec for record in records.values()))
    version = versions()["cospadi"]
    settings = CheckpointConfig(groups=specs, experts=tuple(experts), backend=backend, library_version=version)
    _write_settings(out, source, settings)
    return other_bytes


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
