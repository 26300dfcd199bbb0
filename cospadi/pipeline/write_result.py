"""The result of a run: the checkpoint folder of the compressed model, and its report."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, cast

from cospadi.allocation import Assignment
from cospadi.calibration import fingerprint
from cospadi.errors import CheckpointError, UsageError
from cospadi.events import Listener, Written
from cospadi.files import read_json
from cospadi.formats import CHECKSUMS, CheckpointConfig, ShardWriter, write_checksums
from cospadi.models import OpenModel, fuse_experts
from cospadi.pipeline.job import Job
from cospadi.pipeline.records import GroupRecord, Records
from cospadi.pipeline.work_folder import clear_finished
from cospadi.recipe import CompressionConfig
from cospadi.reporting import GroupRow, KeptLayer, Report, totals, versions, write_report


def write_result(job: Job, plan: Assignment, records: Records, out: Path) -> Report:
    """Write the checkpoint of the finished groups and its report; give the report."""
    rows = [_sound(records, records.row(index)) for index in range(len(plan.groups))]
    split = job.model.split_experts
    fuse_experts(job.model.source.model, set(job.model.source.experts) - set(split))  # loading splits the others only
    other_bytes = write_checkpoint(out, job.model.source, records, len(rows), split, job.config.backend)
    report = _report(job, plan, rows, other_bytes)
    write_report(out, report)
    return report


def finished_report(out: Path, config: CompressionConfig, tell: Listener) -> Report:
    """Give the report of a run that has ended, whose command is repeated.

    Raises
    ------
    UsageError
        The folder holds the result of another recipe.
    """
    report = read_json(out, "report.json")
    if report.get("config") != json.loads(json.dumps(config.to_dict())):
        raise UsageError(f"output folder {out} holds a model made by another recipe: choose a new folder, or delete it")
    clear_finished(out)
    tell(Written(str(out)))
    return cast(Report, report)


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


def _report(job: Job, plan: Assignment, rows: list[GroupRow], other_bytes: int) -> Report:
    """Assemble the report."""
    config, model = job.config, job.model
    uniform = "a factorisation would save nothing at this ratio"
    reason = uniform if config.allocation == "uniform" else "the bytes are spent better elsewhere"
    kept: list[KeptLayer] = [
        {
            "name": layer.name,
            "reason": reason,
            "in_features": layer.in_features,
            "out_features": layer.out_features,
        }
        for group in plan.dense
        for layer in group.layers
    ]
    return {
        "cospadi": versions()["cospadi"],
        "model": model.source.name,
        "left_out": list(model.source.unused),
        "causal": model.source.model.can_generate(),
        "config": config.to_dict(),
        "calibration": {
            "source": config.calibration.text or "the public-domain text of the package",
            "fingerprint": fingerprint(model.windows),
            "windows": model.windows.shape[0],
            "seq_len": model.windows.shape[1],
            "loss": next((job.measurements[source].note for source in model.sources), ""),
        },
        "solver": {"name": job.method.solver_name, "reason": job.reason},
        "format": job.method.format,
        "allocation": plan.account,
        "groups": rows,
        "kept_dense": kept,
        "totals": totals(rows, kept, other_bytes),
        "evaluation": None,
    }
