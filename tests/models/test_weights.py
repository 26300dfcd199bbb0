"""Tensors read one by one from a folder are those that transformers loads."""

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from cospadi.errors import CheckpointError, UsageError
from cospadi.models.dense_model import make_skeleton, open_model
from cospadi.models.experts import split_experts
from cospadi.models.layers import find_blocks
from cospadi.models.residency import Residency
from cospadi.models.weights import FolderWeights
from tests.helpers import ARCHITECTURES, outputs, tiny_model, token_windows

CPU = torch.device("cpu")


def saved(architecture, folder, dtype=torch.float32, shard="30KB"):
    tiny_model(architecture).to(dtype).save_pretrained(folder, max_shard_size=shard)
    return Path(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_equals_that_of_from_pretrained(tmp_path, architecture, dtype):
    folder = saved(architecture, tmp_path, dtype)
    config = tf.AutoConfig.from_pretrained(folder)
    loaded = getattr(tf, config.architectures[0]).from_pretrained(folder, dtype="auto")
    skeleton = make_skeleton(config, folder)
    weights = FolderWeights(folder, skeleton)
    expected = loaded.state_dict()
    found = weights.read(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert torch.equal(weights[name], tensor)
    computed = dict(skeleton.named_buffers())
    for name, buffer in loaded.named_buffers():
        if name not in expected:
            assert computed[name].dtype == buffer.dtype
            assert torch.equal(computed[name], buffer)
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in loaded.named_parameters()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_streamed_model_computes_the_same_with_one_block_in_memory(tmp_path, architecture):
    folder = saved(architecture, tmp_path)
    windows = token_windows()
    expected = outputs(open_model(folder, CPU, object(), split=True).model, windows)
    source = open_model(folder, CPU, object(), streamed=True, split=True)
    assert all(p.is_meta for n, p in source.model.named_parameters() if "layers" in n)
    blocks = find_blocks(source.model)
    most = 0

    def count(*_):
        nonlocal most
        loaded = [any(not p.is_meta for p in block.parameters()) for block in blocks.values()]
        most = max(most, sum(loaded))

    handles = [block.register_forward_hook(count) for block in blocks.values()]
    with source.running():
        assert torch.equal(outputs(source.model, windows), expected)
    assert most == 1
    for handle in handles:
        handle.remove()
    assert all(p.is_meta for n, p in source.model.named_parameters() if "layers" in n)
    with source.twin() as (twin, _):
        assert torch.equal(outputs(twin, windows), expected)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3-moe"])
def test_a_layer_of_an_expert_is_read_alone(tmp_path, architecture):
    folder = saved(architecture, tmp_path)
    whole = open_model(folder, CPU, object(), split=True)
    streamed = open_model(folder, CPU, object(), streamed=True, split=True)
    assert whole.experts == streamed.experts == tuple(split_experts(tiny_model(architecture)))
    names = [name for name, module in whole.model.named_modules() if isinstance(module, torch.nn.Linear)]
    for name in names:
        assert torch.equal(streamed.matrix(name), whole.matrix(name))
        assert streamed.matrix(name).stride() == whole.matrix(name).stride()
    assert whole.digest() == streamed.digest()


def test_a_folder_and_the_model_of_it_have_one_digest_and_a_changed_byte_another(tmp_path):
    folder = saved("qwen2", tmp_path, torch.bfloat16, "10MB")
    digest = open_model(folder, CPU, object(), streamed=True).digest()
    assert open_model(folder, CPU, object()).digest() == digest
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    assert open_model(folder, CPU, object()).digest() != digest


def test_a_tensor_that_the_model_needs_and_no_file_holds_is_named(tmp_path):
    folder = saved("llama", tmp_path, shard="10MB")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"needs tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(folder, CPU, object())


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path):
    folder = saved("llama", tmp_path, shard="10MB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 52}))
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \(48, 32\).*\(52, 32\)"):
        open_model(folder, CPU, object())


def test_tensors_of_mixed_dtypes_become_those_of_the_config_as_in_transformers(tmp_path):
    folder = saved("llama", tmp_path, torch.bfloat16, "10MB")
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors)[::2]:
        tensors[name] = tensors[name].float()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = tf.LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    source = open_model(folder, CPU, object(), streamed=True)
    for name, tensor in loaded.state_dict().items():
        assert source.weights[name].dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(source.weights[name], tensor)


def test_a_config_without_dtype_takes_that_of_the_first_tensor(tmp_path):
    folder = saved("llama", tmp_path, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_model(folder, CPU, object(), streamed=True).dtype == torch.bfloat16


def test_a_folder_without_safetensors_is_refused(tmp_path):
    folder = saved("llama", tmp_path, shard="10MB")
    (folder / "model.safetensors").unlink()
    with pytest.raises((CheckpointError, UsageError), match=r"model\.safetensors.*missing"):
        open_model(folder, CPU, object())


def test_keeping_everything_loads_each_tensor_once(tmp_path):
    folder = saved("llama", tmp_path)
    config = tf.AutoConfig.from_pretrained(folder)
    skeleton = make_skeleton(config, folder)
    weights = FolderWeights(folder, skeleton)
    reads = []
    read = weights.read
    weights.read = lambda names: reads.extend(names) or read(names)
    residency = Residency(skeleton, tuple(find_blocks(skeleton)), weights, CPU, keep=True)
    with residency.attached():
        for _ in range(2):
            outputs(skeleton, token_windows())
    assert len(reads) == len(set(reads)) == len(list(skeleton.parameters()))
