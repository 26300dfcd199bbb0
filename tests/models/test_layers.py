import pytest
import torch
from torch import nn

from cospadi.calibration.lockstep import forward_call
from cospadi.errors import UsageError
from cospadi.models.groups import form_groups
from cospadi.models.layers import map_model, weight_matrix
from tests.helpers import ARCHITECTURES, tiny_model, token_windows


def mapped(architecture, **patterns):
    model = tiny_model(architecture)
    call = forward_call(model, torch.device("cpu"))
    return model, map_model(model, lambda: call(token_windows(1, 8)), **patterns)


NATURAL = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "opt": [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "bert": [["query", "key", "value"], ["dense"], ["dense"], ["dense"]],
    # Phi runs attention and MLP on the same normed input.
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
}


@pytest.mark.parametrize("architecture", NATURAL)
def test_natural_groups_are_the_layers_that_receive_the_same_tensor(architecture):
    _, found = mapped(architecture)
    groups = form_groups([la for la in found.layers if la.block == 1], "natural")
    tails = sorted(sorted(la.name.rpartition(".")[2] for la in group.layers) for group in groups)
    assert tails == sorted(sorted(group) for group in NATURAL[architecture])
    assert all(group.shared_input for group in groups)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("grouping", ["none", "natural", "consecutive:2", "consecutive:99"])
def test_groups_partition_the_layers_and_share_an_input_width(architecture, grouping):
    _, found = mapped(architecture)
    groups = form_groups(found.layers, grouping)
    assert sorted(la.name for g in groups for la in g.layers) == sorted(la.name for la in found.layers)
    assert all(len({la.in_features for la in g.layers}) == 1 for g in groups)
    assert [g.last_block for g in groups] == sorted(g.last_block for g in groups)
    if grouping == "none":
        assert len(groups) == len(found.layers)
    if grouping == "consecutive:99":
        assert len(groups) == len({la.kind for la in found.layers})


def test_weights_are_oriented_in_by_out_for_linear_and_conv1d():
    for architecture in ("llama", "gpt2"):
        model, found = mapped(architecture)
        modules = dict(model.named_modules())
        for layer in found.layers:
            module = modules[layer.name]
            x = torch.randn(3, layer.in_features)
            bias = module.bias if layer.bias else 0
            torch.testing.assert_close(module(x), x @ weight_matrix(module) + bias)


def test_patterns_choose_layers():
    _, found = mapped("llama", include=("*mlp*",), exclude=("*.down_proj",))
    assert {la.name.rpartition(".")[2] for la in found.layers} == {"gate_proj", "up_proj"}


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        ({"include": ("*nothing*",)}, "matches nothing"),
        ({"include": ("*embed_tokens",)}, "Embedding modules, which cannot be compressed"),
        ({"exclude": ("*typo*",)}, "matches nothing"),
        ({"exclude": ("*",)}, "no layer to compress"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(patterns, text):
    with pytest.raises(UsageError, match=text):
        mapped("llama", **patterns)


def test_models_without_blocks_or_with_shared_blocks_are_refused():
    with pytest.raises(UsageError, match="no list of blocks"):
        map_model(nn.Sequential(nn.Linear(2, 2)), lambda: None)

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])

        def forward(self):
            return self.blocks[0](self.blocks[0](torch.ones(1, 2)))

    model = Loop()
    with pytest.raises(UsageError, match="more than once"):
        map_model(model, model)
    assert not any(m._forward_pre_hooks for m in model.modules())
