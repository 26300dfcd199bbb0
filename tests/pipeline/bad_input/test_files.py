"""Files of the model that are missing, damaged, or lead elsewhere."""

import json
import os
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.checkpoint import INDEX
from tests.pipeline.bad_input.common import BLOCKS, edit, nothing_begun, refused, run


def test_the_model_that_the_others_are_made_of_is_compressed(folder, out):
    assert len(list(folder.glob("*.safetensors"))) > 2
    run(folder, out)
    assert (out / "config.json").exists()


def rewrite(folder, change):
    """Change the tensors of every shard."""
    for path in folder.glob("*.safetensors"):
        save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_tensors_of_mixed_dtypes_are_those_of_the_config(folder, out):
    rewrite(folder, lambda name, tensor: tensor.bfloat16() if "mlp" in name else tensor.half())
    run(folder, out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_whole_numbers_in_place_of_weights_are_refused_as_quantised(folder, out):
    rewrite(folder, lambda name, tensor: tensor.to(torch.int8) if name.endswith("1.mlp.up_proj.weight") else tensor)
    refused(CheckpointError, [f"{BLOCKS}.1.mlp.up_proj.weight", "torch.int8", "quantised"], folder, out)


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


UP = f"{BLOCKS}.1.mlp.up_proj.weight"


def test_a_shard_that_the_index_names_and_that_is_missing(folder, out):
    path = shard_of(folder, UP)
    path.unlink()
    refused(CheckpointError, [path.name, "missing"], folder, out)
    assert nothing_begun(out)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", ""])
def test_an_index_that_leaves_the_folder(folder, out, name):
    shutil.copyfile(shard_of(folder, UP), folder.parent / "outside.safetensors")
    edit(folder, INDEX, lambda data: data["weight_map"].update({UP: name}))
    refused(CheckpointError, ["leaves the folder"], folder, out)


def test_a_shard_that_is_a_link_out_of_the_folder(folder, out, tmp_path):
    path = shard_of(folder, UP)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(CheckpointError, [path.name, "link that leaves the folder"], folder, out)


def header(**entry):
    def change(path):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        parsed[UP].update(entry)
        text = json.dumps(parsed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


DAMAGE = {
    "a header as long as nothing": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
    "a shape of 2^62": header(shape=[2**62, 2]),
    "a product of sides that wraps around": header(shape=[2**32, 2**32]),
    "offsets beyond the file": header(data_offsets=[2**40, 2**40 + 6144]),
    "negative offsets": header(data_offsets=[-6144, 0]),
    "a file cut off": lambda path: os.truncate(path, path.stat().st_size - 100),
    "a file of three bytes": lambda path: os.truncate(path, 3),
    "an empty file": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_named(folder, out, what):
    path = shard_of(folder, UP)
    DAMAGE[what](path)
    refused(CheckpointError, [path.name], folder, out)
    assert nothing_begun(out)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_not_read(folder, out, name):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(UsageError, [name, "pickle", "safetensors"], folder, out)
