"""Fused experts as linear layers and back."""

import copy

import pytest
import torch
from torch import nn

from cospadi.errors import CheckpointError, UsageError
from cospadi.models.experts import ExpertLinears, fuse_experts, split_experts

from ..helpers import outputs, tiny_model, token_windows

MODELS = ["mixtral", "qwen3-moe"]


@pytest.mark.parametrize("architecture", MODELS)
def test_splitting_keeps_the_outputs_and_fusing_gives_the_model_back(architecture):
    model = tiny_model(architecture)
    windows = token_windows(3, 12)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    before = outputs(model, windows)
    names = split_experts(model)
    assert names == [f"model.layers.{i}.mlp.experts" for i in range(2)]
    experts = model.get_submodule(names[0])
    assert {type(layer) for layer in (*experts.gate_up, *experts.down)} == {nn.Linear}
    torch.testing.assert_close(outputs(model, windows), before)
    assert fuse_experts(model) == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(outputs(model, windows), before, rtol=0, atol=0)


def test_splitting_copies_no_weights():
    model = tiny_model("mixtral")
    storage = model.model.layers[0].mlp.experts.down_proj.untyped_storage().data_ptr()
    split_experts(model)
    assert model.model.layers[0].mlp.experts.down[3].weight.untyped_storage().data_ptr() == storage


def test_skeletons_on_the_meta_device_are_split_too():
    with torch.device("meta"):
        model = type(tiny_model("mixtral"))(tiny_model("mixtral").config)
    split_experts(model)
    layer = model.model.layers[1].mlp.experts.gate_up[2]
    assert (layer.weight.device.type, layer.weight.shape) == ("meta", (96, 32))
    fuse_experts(model)
    assert model.model.layers[1].mlp.experts.gate_up_proj.shape == (4, 96, 32)


def test_a_token_without_an_expert_and_an_expert_without_tokens():
    model = tiny_model("mixtral")
    fused = model.model.layers[0].mlp.experts
    split = ExpertLinears(copy.deepcopy(fused))
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[0, 2], [2, 4], [4, 4]])  # 4 stands for none
    weights = torch.rand(3, 2, generator=torch.Generator().manual_seed(1))
    fused.config._experts_implementation = "eager"
    with torch.no_grad():
        found = split(hidden, index, weights)
        torch.testing.assert_close(found, fused(hidden, index, weights))
    assert torch.equal(found[2], torch.zeros(32))


def test_a_split_model_can_be_copied():
    model = tiny_model("mixtral")
    split_experts(model)
    other = copy.deepcopy(model)
    fuse_experts(other)
    windows = token_windows(2, 8)
    torch.testing.assert_close(outputs(other, windows), outputs(model, windows))


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("has_bias", True), ("is_transposed", True), ("has_gate", False), ("is_concatenated", False)],
)
def test_other_layouts_are_left_alone(attribute, value):
    model = tiny_model("mixtral")
    experts = model.model.layers[1].mlp.experts
    setattr(experts, attribute, value)
    assert split_experts(model) == ["model.layers.0.mlp.experts"]
    assert model.model.layers[1].mlp.experts is experts
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts"):
        split_experts(model, ["model.layers.1.mlp.experts"])


def test_dense_models_have_no_experts():
    model = tiny_model("llama")
    assert split_experts(model) == []
    assert fuse_experts(model) == []


def test_compressed_experts_are_not_fused():
    model = tiny_model("mixtral")
    split_experts(model)
    model.model.layers[0].mlp.experts.down[0] = nn.Identity()
    with pytest.raises(UsageError, match="restore the dense layers"):
        fuse_experts(model)
