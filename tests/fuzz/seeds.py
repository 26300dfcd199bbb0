"""Small checkpoints of every way of storing, to begin from."""

import json
import struct
from pathlib import Path

import torch
from cospadi_cli.commands.inspect import inspect_checkpoint

from cospadi.formats.base import FORMATS
from cospadi.formats.checkpoint import CheckpointConfig, ShardWriter
from cospadi.formats.checksums import write_checksums
from cospadi.formats.dictionary import DICTIONARY_DTYPES
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group

from ..checkpoints import random_group, random_output_group
from .targets import Reader


def small_checkpoint(folder, format="bitmask", value_dtype="bfloat16", shards=1, change=None, output=False):
    """Two layers in one group beside one ordinary tensor; ``change`` edits the tensors before they are written.

    The value dtype may name the dictionary's too: "int4 with int3g32".  ``output`` puts the dictionary of a single
    layer on that side, and the format ``identity`` has a single layer, too.
    """
    spec, tensors = _group(format, value_dtype, output)
    if change:
        change(tensors)
    with ShardWriter(folder, 10**9 if shards == 1 else 1) as writer:
        writer.add("block", tensors)
        writer.add("norm", {"norm.weight": torch.ones(5)})
    config = CheckpointConfig((spec,), (), "auto", "0.1.0")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}))
    return folder


def all_kinds():
    """Every format, value dtype, dictionary dtype and side as (format, value dtype with dictionary dtype, output)."""
    kinds = []
    for format in ("bitmask", "csr", "dense"):
        kinds += [(format, value, False) for value in FORMATS.create(format).value_dtypes]
    kinds += [("bitmask", f"bfloat16 with {dtype}", False) for dtype in DICTIONARY_DTYPES if dtype != "none"]
    kinds += [("bitmask", "bfloat16 with none", False), ("csr", "int8", True), ("dense", "int4 with int3g32", True)]
    return kinds + [("identity", f"none with {dtype}", False) for dtype in ("bfloat16", "int8", "int4g32")]


def _group(format, value_dtype, output):
    generator = torch.Generator().manual_seed(0)
    biases = {"block.q": torch.ones(6)}
    values, _, atoms = value_dtype.partition(" with ")
    if output:
        return random_output_group("block.q", 5, 6, 11, generator, format, values, biases)
    if format == "identity":
        weight = SparseFactorization.of_weight("block.q", torch.randn(5, 6, generator=generator))
        return pack_group(weight, format, values, biases, True, atoms)
    if atoms == "none":
        sparse = {name: torch.randn(5, width, generator=generator) for name, width in (("block.q", 6), ("block.k", 4))}
        return pack_group(SparseFactorization(torch.eye(5), sparse), format, values, biases, True, atoms)
    members = {"block.q": 6, "block.k": 4}
    return random_group(members, 5, 11, generator, format, values, biases, dictionary_dtype=atoms or None)


def fuzz_inputs(folder: Path) -> list[bytes]:
    """Inputs of every target of ``targets.TARGETS``, from checkpoints that are written into a folder."""
    inputs = []
    for number, (format, value_dtype, output) in enumerate(all_kinds()):
        made = small_checkpoint(folder / str(number), format, value_dtype, output=output)
        config, file = (made / "config.json").read_bytes(), (made / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", file[:8])
        description = json.dumps(json.loads(config)["quantization_config"]).encode()
        inputs += [b"\0" + description, b"\1" + file, b"\4" + struct.pack("<I", len(config)) + config + file]
        data = file[8 + length :]
        inputs += [bytes([5, number, 10, 5, 33]) + data, bytes([6, number, 10, 4]) + data]
    reader = Reader(folder / "reader")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    inputs.append(b"\2" + json.dumps({"metadata": {"total_size": 2}, "weight_map": shards}).encode())
    write_checksums(reader.shards)
    inputs.append(b"\3" + (reader.shards / "SHA256SUMS").read_bytes())
    report = inspect_checkpoint(reader.reported)
    for row in report["groups"]:
        for one in (row, *row["members"]):
            one["relative_error"] = 0.25
    return [*inputs, b"\7" + json.dumps(report).encode()]
