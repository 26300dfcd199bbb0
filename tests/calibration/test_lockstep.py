import pytest
import torch

from cospadi.calibration.collectors import GramCollector
from cospadi.calibration.lockstep import Lockstep, forward_call
from cospadi.models.layers import map_model
from tests.helpers import ARCHITECTURES, outputs, tiny_model, token_windows

CPU = torch.device("cpu")


def walk_grams(model, windows, batch_size):
    call = forward_call(model, CPU)
    mapped = map_model(model, lambda: call(windows[:1, :8]))
    modules = dict(model.named_modules())
    grams = {}
    with Lockstep([modules[b] for b in mapped.blocks], call, windows.split(batch_size)) as walk:
        for block in range(len(mapped.blocks)):
            layers = {la.name: la for la in mapped.layers if la.block == block}
            with GramCollector({n: modules[n] for n in layers}, {n: la.in_features for n, la in layers.items()}) as c:
                walk.advance()
            grams.update(c.statistics)
    return mapped, grams


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_by_block_grams_equal_those_of_plain_forward_passes(architecture):
    model, windows = tiny_model(architecture), token_windows()
    mapped, grams = walk_grams(model, windows, batch_size=4)
    modules = dict(model.named_modules())
    widths = {layer.name: layer.in_features for layer in mapped.layers}
    with GramCollector({n: modules[n] for n in widths}, widths) as plain:
        for batch in windows.split(4):
            outputs(model, batch)
    assert set(grams) == set(plain.statistics)
    for name, gram in grams.items():
        assert gram.n_tokens == plain.statistics[name].n_tokens
        torch.testing.assert_close(gram.matrix, plain.statistics[name].matrix, rtol=1e-6, atol=1e-6)


def test_hooks_are_removed_even_after_an_error():
    model, windows = tiny_model("llama"), token_windows()
    before = outputs(model, windows)

    def fail(batch):
        model.model.layers[0](None)

    blocks = list(model.model.layers)
    with pytest.raises((TypeError, AttributeError)), Lockstep(blocks, fail, [windows]) as walk:
        walk.advance()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(outputs(model, windows), before)


def test_wrong_block_order_is_noticed():
    model, windows = tiny_model("llama"), token_windows()
    blocks = list(model.model.layers)[::-1]
    with (
        pytest.raises(RuntimeError, match="begin with the first"),
        Lockstep(blocks, forward_call(model, CPU), [windows]),
    ):
        pass
    blocks = [*model.model.layers, model.model.layers[0]]
    walk = Lockstep(blocks, forward_call(model, CPU), [windows])
    with pytest.raises(RuntimeError, match="order"), walk:
        [walk.advance() for _ in blocks]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_advancing_past_the_end_is_an_error():
    model, windows = tiny_model("llama"), token_windows()
    with Lockstep(list(model.model.layers), forward_call(model, CPU), [windows]) as walk:
        walk.advance()
        walk.advance()
        with pytest.raises(RuntimeError, match="all blocks"):
            walk.advance()
