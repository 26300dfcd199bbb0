import pytest
import torch

from cospadi.calibration.layer_order import find_stages
from cospadi.calibration.lockstep import forward_call
from cospadi.errors import UsageError
from cospadi.models.experts import split_experts
from cospadi.models.layers import map_model
from tests.helpers import outputs, tiny_model, token_windows

from .toys import Plain, Routed, Toy, Twice, Ungraded

CPU = torch.device("cpu")
QKV = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
DECODER = [QKV, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
EXPERTS = [[f"mlp.experts.{part}.{index}" for index in range(4)] for part in ("gate_up", "down")]
EXPECTED = {
    "llama": DECODER,
    "qwen2": DECODER,
    "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    "phi": [[*QKV, "mlp.fc1"], ["self_attn.dense", "mlp.fc2"]],  # attention and MLP side by side
    "mixtral": [QKV, ["self_attn.o_proj"], *EXPERTS],
    "bert": [
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        ["attention.output.dense"],
        ["intermediate.dense"],
        ["output.dense"],
    ],
}


def stages(model, example, **patterns):
    call = forward_call(model, CPU)
    mapped = map_model(model, lambda: call(example), **patterns)
    return find_stages(model, mapped, lambda: call(example))


def kinds(found):
    return [[[layer.kind for layer in stage] for stage in block] for block in found]


@pytest.mark.parametrize("architecture", EXPECTED)
def test_the_order_of_execution_within_every_block(architecture):
    model, windows = tiny_model(architecture), token_windows()
    before = outputs(model, windows)
    split_experts(model)
    after_split = outputs(model, windows)
    found = stages(model, windows[:1, :8])
    assert kinds(found) == [EXPECTED[architecture]] * 2
    assert [{layer.block for stage in block for layer in stage} for block in found] == [{0}, {1}]
    assert torch.equal(outputs(model, windows), after_split)
    torch.testing.assert_close(after_split, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_experts_that_the_example_does_not_reach_stay_with_the_others():
    model = tiny_model("mixtral")
    split_experts(model)
    example = token_windows(1, 1)  # one token, two of the four experts
    assert kinds(stages(model, example)) == [EXPECTED["mixtral"]] * 2


def test_layers_left_out_are_looked_through():
    model, example = tiny_model("llama"), token_windows(1, 8)
    found = stages(model, example, exclude=("*o_proj", "*q_proj"))
    assert kinds(found) == [[QKV[1:], *DECODER[2:]]] * 2
    found = stages(model, example, include=("*.1.*down_proj", "*.1.*o_proj"))
    assert kinds(found) == [[], [["self_attn.o_proj"], ["mlp.down_proj"]]]


def test_frozen_weights_do_not_hide_the_order():
    model = tiny_model("llama").requires_grad_(False)
    with torch.no_grad():
        assert kinds(stages(model, token_windows(1, 8))) == [DECODER] * 2


def test_experts_come_after_the_layer_that_chooses_them():
    found = stages(Toy(Routed()), torch.arange(12)[None])
    assert kinds(found) == [[["router"], ["experts.0", "experts.1", "experts.2"]]]


def test_what_cannot_be_ordered_is_refused_and_no_hook_stays():
    for block, error, text in ((Twice(), UsageError, "more than once"), (Ungraded(), RuntimeError, "gradients off")):
        model = Toy(Plain(), block)
        with pytest.raises(error, match=rf"layers\.1\.only.*{text}"):
            stages(model, torch.arange(6)[None])
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
