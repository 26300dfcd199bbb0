import copy
from dataclasses import replace

import pytest
import torch

from cospadi.calibration.lockstep import WalkedModel, forward_call
from cospadi.calibration.sequential import ROUTED, SequentialWalk
from cospadi.errors import NumericalError
from cospadi.models.experts import split_experts
from cospadi.models.layers import map_model, weight_matrix
from cospadi.pipeline.stages import collect_grams
from cospadi.whitening.square_root import corrected_weight, whitening_from_gram
from tests.helpers import outputs, tiny_model, token_windows

from .toys import InPlace, Plain, Routed, Toy

CPU = torch.device("cpu")
ARCHITECTURES = ["llama", "qwen2", "gpt2", "mixtral", "bert"]


def walked(model):
    return WalkedModel(model, forward_call(model, CPU))


class Pair:
    """A dense model, its copy, and how to walk them."""

    def __init__(self, model, windows, batch_size=4):
        split_experts(model)
        self.dense, self.copy = model, copy.deepcopy(model)
        self.windows, self.batches = windows, windows.split(batch_size)
        self.example = windows[:1, :8]
        self.mapped = map_model(model, lambda: forward_call(model, CPU)(self.example))

    def walk(self, mapped=None, reference=True, **options):
        if reference:
            options["dense"] = walked(self.dense)
        return SequentialWalk(walked(self.copy), mapped or self.mapped, self.batches, self.example, **options)

    def weight(self, name):
        return weight_matrix(self.dense.get_submodule(name))

    def hooks(self):
        modules = (*self.dense.modules(), *self.copy.modules())
        return [m for m in modules if m._forward_pre_hooks or m._forward_hooks]


def pair(architecture, **options):
    return Pair(tiny_model(architecture), token_windows(), **options)


def rounded(weight, step=0.02):
    """A crude compression: the tiny models' weights are about 0.02 large."""
    return (weight / step).round() * step


def inputs_of(model, windows, names):
    """The obvious way: one forward pass of the whole model for all layers, rows copied to float64."""
    found = {name: [] for name in names}
    handles = [
        model.get_submodule(n).register_forward_pre_hook(lambda m, a, n=n: found[n].append(a[0].double()))
        for n in names
    ]
    with torch.no_grad():
        forward_call(model, CPU)(windows)
    for handle in handles:
        handle.remove()
    return {name: torch.cat([p.reshape(-1, p.shape[-1]) for p in parts]) for name, parts in found.items() if parts}


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_nothing_replaced_the_statistics_are_those_of_one_shot_calibration(architecture):
    models = pair(architecture)
    grams = collect_grams(tiny_model(architecture), models.windows, batch_size=4, device="cpu")
    seen = set()
    with models.walk() as walk:
        for _ in walk:
            for name, statistic in walk.collect().items():
                torch.testing.assert_close(statistic.gram.matrix, grams[name].matrix, rtol=1e-6, atol=1e-6)
                assert statistic.n_tokens == grams[name].n_tokens
                if ".experts." in name:
                    assert (statistic.shift, statistic.note) == (None, ROUTED)
                else:
                    assert not statistic.shift.any()
                    assert not statistic.note
                seen.add(name)
    assert seen == set(grams)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_after_replacements_the_statistics_are_those_of_the_two_whole_models(architecture):
    models = pair(architecture)
    by_hand = copy.deepcopy(models.dense)
    before = outputs(models.dense, models.windows)
    order, moved = [], 0
    with models.walk() as walk:
        for step in walk:
            found = walk.collect()
            assert set(found) == {layer.source for layer in step.layers}
            new = inputs_of(by_hand, models.windows, found)
            old = inputs_of(models.dense, models.windows, found)
            for name, statistic in found.items():
                rows = new.get(name, torch.zeros(0, statistic.gram.matrix.shape[0], dtype=torch.float64))
                assert statistic.n_tokens == len(rows)
                if len(rows):
                    close(statistic.gram.matrix, rows.T @ rows)
                if ".experts." in name:
                    assert statistic.note == ROUTED
                    continue
                close(statistic.gram.matrix + statistic.shift, rows.T @ old[name])
                moved += bool(statistic.shift.any())
            for layer in step.layers:
                weight = rounded(models.weight(layer.name))
                walk.replace(layer.name, weight)
                weight_matrix(by_hand.get_submodule(layer.name)).copy_(weight)
                order.append(layer.name)
    assert order == [layer.name for step in walk.steps for layer in step.layers]
    assert sorted(order) == sorted(layer.name for layer in models.mapped.layers)
    # All but the first input of the first block (and the experts) have moved.
    assert moved == sum(".experts." not in n for n in {la.source for la in models.mapped.layers}) - 1
    assert torch.equal(outputs(models.dense, models.windows), before)
    assert torch.equal(outputs(models.copy, models.windows), outputs(by_hand, models.windows))
    assert not models.hooks()


def test_a_part_of_the_layers_and_no_dense_model():
    models = pair("llama")
    chosen = tuple(la for la in models.mapped.layers if la.block == 0 and la.kind in ("mlp.up_proj", "mlp.down_proj"))
    with models.walk(replace(models.mapped, layers=chosen), reference=False) as walk:
        steps = []
        for step in walk:
            ((name, statistic),) = walk.collect().items()
            rows = inputs_of(models.copy, models.windows, [name])[name]
            close(statistic.gram.matrix, rows.T @ rows)
            assert (statistic.shift, statistic.note) == (None, "")
            walk.replace(step.layers[0].name, rounded(models.weight(step.layers[0].name)))
            steps.append((name, step.layers[0].kind))
    # up's input is named after gate, which receives it first and is not among the layers.
    gate, down = (f"model.layers.0.mlp.{kind}_proj" for kind in ("gate", "down"))
    assert steps == [(gate, "mlp.up_proj"), (down, "mlp.down_proj")]


def test_steps_that_are_not_collected_give_the_same_as_those_that_are():
    def last_of(skipped):
        models = pair("llama")
        with models.walk() as walk:
            for index, step in enumerate(walk):
                if index not in skipped:
                    found = walk.collect()
                for layer in step.layers:
                    walk.replace(layer.name, rounded(models.weight(layer.name)))
        ((_, statistic),) = found.items()
        return statistic

    every, again, few = last_of(()), last_of(()), last_of((0, 1, 3, 5, 6))
    for other in (again, few):
        assert torch.equal(every.gram.matrix, other.gram.matrix)
        assert torch.equal(every.shift, other.shift)
    assert every.shift.any()


def test_layers_of_earlier_blocks_are_seen_from_the_next_block_on():
    models = Pair(Toy(Plain(), Plain(), Plain(), Plain()), torch.arange(40).reshape(4, 10))
    names = [layer.name for layer in models.mapped.layers]
    by_hand = copy.deepcopy(models.dense)
    waiting = []
    with models.walk() as walk:
        for index, step in enumerate(walk):
            (statistic,) = walk.collect().values()
            rows = inputs_of(by_hand, models.windows, [names[index]])[names[index]]
            close(statistic.gram.matrix, rows.T @ rows)
            waiting.append(step.layers[0].name)
            if index % 2:  # groups of two blocks
                for name in waiting:
                    walk.replace(name, rounded(models.weight(name), 0.5))
                    weight_matrix(by_hand.get_submodule(name)).copy_(rounded(models.weight(name), 0.5))
                waiting.clear()
    assert not models.hooks()
    assert torch.equal(outputs_of(models.copy, models.windows), outputs_of(by_hand, models.windows))


def outputs_of(model, windows):
    with torch.no_grad():
        return model(input_ids=windows)


def test_blocks_that_work_in_place_are_run_on_clones():
    models = Pair(Toy(InPlace(), InPlace()), torch.arange(40).reshape(4, 10), batch_size=2)
    by_hand = copy.deepcopy(models.dense)
    with models.walk() as walk:
        for step in walk:
            found = walk.collect()
            again = walk.collect()
            new = inputs_of(by_hand, models.windows, found)
            for name, statistic in found.items():
                assert torch.equal(statistic.gram.matrix, again[name].gram.matrix)
                close(statistic.gram.matrix, new[name].T @ new[name])
            for layer in step.layers:
                walk.replace(layer.name, rounded(models.weight(layer.name), 0.5))
                weight_matrix(by_hand.get_submodule(layer.name)).copy_(rounded(models.weight(layer.name), 0.5))


def test_an_expert_sees_its_own_tokens_and_says_so():
    models = Pair(Toy(Routed()), torch.arange(40).reshape(4, 10))
    with models.walk() as walk:
        router, experts = [walk.collect() for _ in walk]
    rows = inputs_of(models.dense, models.windows, ["layers.0.router", "layers.0.experts.0"])
    close(router["layers.0.router"].gram.matrix, rows["layers.0.router"].T @ rows["layers.0.router"])
    first = experts["layers.0.experts.0"]
    close(first.gram.matrix, rows["layers.0.experts.0"].T @ rows["layers.0.experts.0"])
    assert first.note == ROUTED
    never = experts["layers.0.experts.2"]
    assert (never.n_tokens, never.shift, bool(never.gram.matrix.any())) == (0, None, False)
    assert ROUTED in never.note


def sequential(models, alpha, compress):
    """Replace every layer; give the mean squared error of the outputs."""
    with models.walk() as walk:
        for step in walk:
            found = walk.collect()
            for layer in step.layers:
                statistic = found[layer.source]
                whitening = whitening_from_gram(statistic.gram.matrix, statistic.n_tokens)
                target = corrected_weight(models.weight(layer.name), whitening, statistic.shift, alpha, ridge=0)
                walk.replace(layer.name, compress(layer, target))
    return float((outputs_of(models.copy, models.windows) - outputs_of(models.dense, models.windows)).square().mean())


def test_a_later_layer_makes_good_what_an_earlier_one_lost():
    """Block 0 is multiplied by an invertible matrix; the dense outputs as target undo it exactly."""

    def lose(layer, target):
        turn = torch.eye(6) + 0.1 * torch.ones(6, 6)
        return target.float() @ turn if layer.block == 0 else target

    errors = {}
    for alpha in (0.0, 0.5, 1.0):
        models = Pair(Toy(Plain(), Plain(), Plain()), torch.arange(48).reshape(4, 12))
        errors[alpha] = sequential(models, alpha, lose)
    scale = float(outputs_of(models.dense, models.windows).square().mean())
    assert errors[1.0] < 1e-10 * scale
    assert errors[1.0] < errors[0.5] < errors[0.0]
    assert errors[0.0] > 1e-3 * scale


def test_the_dense_outputs_as_target_lower_the_error_of_a_compressed_model():
    def outcome(alpha):
        models = pair("llama")
        models.batches = token_windows(40, 24, seed=5).split(8)
        with torch.no_grad():  # large enough for the blocks to matter beside the residual stream
            for model in (models.dense, models.copy):
                for layer in models.mapped.layers:
                    model.get_submodule(layer.name).weight.mul_(10)
        with models.walk() as walk:
            for step in walk:
                found = walk.collect()
                for layer in step.layers:
                    statistic = found[layer.source]
                    whitening = whitening_from_gram(statistic.gram.matrix, statistic.n_tokens)
                    target = corrected_weight(models.weight(layer.name), whitening, statistic.shift, alpha)
                    walk.replace(layer.name, rounded(target, 0.2))
        held_out = token_windows(20, 24, seed=6)
        return float((outputs(models.copy, held_out) - outputs(models.dense, held_out)).square().mean())

    assert outcome(1.0) < 0.98 * outcome(0.0)


def test_an_error_inside_the_walk_cleans_up():
    models = pair("llama")
    with torch.no_grad():
        models.copy.model.layers[1].input_layernorm.weight[3] = float("nan")
    before = outputs(models.dense, models.windows)
    walk = models.walk()
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.q_proj"), walk:
        [walk.collect() for _ in walk]
    assert not models.hooks()
    assert torch.equal(outputs(models.dense, models.windows), before)
    with pytest.raises(ValueError, match="no step"):
        walk.collect()


def test_an_error_on_the_way_in_cleans_up():
    models = pair("llama")

    def fail(batch):
        raise ArithmeticError("in the dense model, when the copy's passes have begun")

    dense = WalkedModel(models.dense, fail)
    walk = SequentialWalk(walked(models.copy), models.mapped, models.batches, models.example, dense)
    with pytest.raises(ArithmeticError, match="begun"), walk:
        pass
    assert not models.hooks()


def test_misuse_is_refused():
    models = pair("llama")
    arguments = (walked(models.copy), models.mapped, models.batches, models.example)
    with pytest.raises(ValueError, match="deep copy"):
        SequentialWalk(*arguments, dense=walked(models.copy))
    with pytest.raises(ValueError, match="no layer"):
        SequentialWalk(*arguments, dense=walked(tiny_model("gpt2")))
    with pytest.raises(ValueError, match="inside its context"):
        next(iter(models.walk()))
    with models.walk() as walk:
        with pytest.raises(ValueError, match="no step"):
            walk.collect()
        next(iter(walk))
        name = models.mapped.layers[0].name
        with pytest.raises(ValueError, match="cannot be replaced now"):
            walk.replace("model.layers.1.self_attn.q_proj", models.weight(name))
        with pytest.raises(ValueError, match="cannot be replaced now"):
            walk.replace("lm_head", models.weight(name))
        with pytest.raises(ValueError, match=r"shape \(32, 32\), not \(32, 31\)"):
            walk.replace(name, models.weight(name)[:, 1:])
        with pytest.raises(ValueError, match="once"):
            next(iter(walk))
