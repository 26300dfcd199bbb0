"""The backward pass against plain autograd, window by window, in float64."""

import copy

import numpy as np
import pytest
import torch
import transformers as tf

from cospadi.calibration.collectors import GramCollector
from cospadi.calibration.lockstep import forward_call
from cospadi.calibration.sensitivity import frozen
from cospadi.errors import NumericalError, UsageError
from cospadi.models.experts import split_experts
from cospadi.models.layers import map_model
from tests.calibration.toys import collect_statistics
from tests.helpers import tiny_model, token_windows

CPU = torch.device("cpu")
EVERYTHING = {"weighted": True}


def ready(architecture, dtype=torch.float64):
    """A tiny model with split experts, its windows, how to call it, and its map."""
    model, windows = tiny_model(architecture).to(dtype), token_windows(5, 12)
    split_experts(model)
    call = forward_call(model, CPU)
    return model, windows, call, map_model(model, lambda: call(windows[:1, :8]))


def collect(architecture, dtype=torch.float64, **options):
    model, windows, call, mapped = ready(architecture, dtype)
    return collect_statistics(model, mapped, call, windows, **{"batch_size": 2, **EVERYTHING, **options})


def drawn_loss(model, output, index, seed):
    """The documented rule, written again: label t of window i inverts the distribution at the t-th uniform number."""
    rng = np.random.default_rng([seed, index])
    if not hasattr(output, "logits"):
        hidden = output.last_hidden_state[0]
        target = hidden.detach() + torch.from_numpy(rng.standard_normal(tuple(hidden.shape)))
        return (hidden - target).square().sum() / -2  # the sign is lost in every second moment
    p = output.logits[0].double().softmax(-1)
    cumulative = p.detach().cumsum(-1).numpy()
    labels = [int(np.searchsorted(c, u, side="right")) for c, u in zip(cumulative, rng.random(len(p)), strict=True)]
    return -sum(p[t, label].log() for t, label in enumerate(labels))


def text_loss(model, output, window):
    return torch.nn.functional.cross_entropy(output.logits[0, :-1], window[0, 1:], reduction="sum")


def brute_force(model, windows, layers, loss):
    """Inputs and output gradients of every layer, call by call, from ordinary autograd."""
    seen = {layer.name: [] for layer in layers}
    handles = []
    for layer in layers:

        def keep(module, args, output, calls=seen[layer.name]):
            output.retain_grad()
            calls.append((args[0].detach().reshape(-1, args[0].shape[-1]), output))

        handles.append(model.get_submodule(layer.name).register_forward_hook(keep))
    for index in range(len(windows)):
        window = windows[index : index + 1]
        loss(model, model(input_ids=window), index, window).backward()
    for handle in handles:
        handle.remove()
    return {
        name: (
            torch.cat([x for x, _ in calls]) if calls else None,
            torch.cat([y.grad.reshape(-1, y.shape[-1]) for _, y in calls]) if calls else None,
        )
        for name, calls in seen.items()
    }


ARCHITECTURES = ["llama", "llama-tied", "qwen3", "gemma2", "phi", "gpt2", "opt", "mixtral", "qwen3-moe", "bert"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_sums_equal_those_of_plain_autograd(architecture):
    found = collect(architecture, seed=3)
    model, windows, _, mapped = ready(architecture)
    expected = brute_force(model, windows, mapped.layers, lambda m, o, i, w: drawn_loss(m, o, i, 3))
    assert set(found) == {layer.source for layer in mapped.layers}
    assert any((g != 0).any() for _, g in expected.values() if g is not None)
    for source, statistics in found.items():
        members = [layer for layer in mapped.layers if layer.source == source]
        assert list(statistics.layers) == [layer.name for layer in members]
        assert statistics.n_tokens == windows.numel()
        weights, x = 0, None
        for layer in members:
            x, g = expected[layer.name]
            tokens = 0 if x is None else len(x)
            assert statistics.layers[layer.name].n_tokens == tokens
            if x is None:
                assert not statistics.squares(layer.name).any()
                continue
            torch.testing.assert_close(statistics.squares(layer.name), (g * g).sum(0) / windows.numel())
            weights = weights + (g * g).sum(1)
        weighted = statistics.weighted_gram()
        if x is None:
            assert statistics.gram.n_tokens == weighted.n_tokens == 0
            assert not weighted.matrix.any()
            continue
        assert statistics.gram.n_tokens == weighted.n_tokens == len(x)
        torch.testing.assert_close(statistics.gram.matrix, x.T @ x)
        torch.testing.assert_close(weighted.matrix, x.T @ (x * (weights / weights.mean())[:, None]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_labels_of_the_text(architecture):
    found = collect(architecture, labels="text")
    model, windows, _, mapped = ready(architecture)
    expected = brute_force(model, windows, mapped.layers, lambda m, o, i, w: text_loss(m, o, w))
    for statistics in found.values():
        assert "empirical" in statistics.note
        for name in statistics.layers:
            g = expected[name][1]
            torch.testing.assert_close(statistics.squares(name), (g * g).sum(0) / windows.numel())


def test_masked_language_models_have_a_label_for_every_position():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=96, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        model = tf.BertForMaskedLM(config).eval().double()
    windows, call = token_windows(3, 8), forward_call(model, CPU)
    mapped = map_model(model, lambda: call(windows[:1]))
    found = collect_statistics(model, mapped, call, windows, seed=1)
    expected = brute_force(model, windows, mapped.layers, lambda m, o, i, w: drawn_loss(m, o, i, 1))
    for statistics in found.values():
        for name in statistics.layers:
            g = expected[name][1]
            torch.testing.assert_close(statistics.squares(name), (g * g).sum(0) / windows.numel())
    with pytest.raises(UsageError, match="does not predict"):
        collect_statistics(model, mapped, call, windows, labels="text")


def test_the_drawn_squares_have_the_fisher_information_as_their_mean():
    """The exact information sums over all labels of all positions; 900 draws estimate it without bias."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1}
        # Larger weights than the usual start: predictions near uniform would not tell p from 1/V.
        config = tf.LlamaConfig(vocab_size=5, max_position_embeddings=8, initializer_range=0.6, **sizes)
        model = tf.LlamaForCausalLM(config).eval().double()
    window, call = torch.tensor([[1, 4, 2]]), forward_call(model, CPU)
    mapped = map_model(model, lambda: call(window))
    exact = {layer.name: 0.0 for layer in mapped.layers}
    for t in range(3):
        for label in range(5):

            def loss(m, o, i, w, t=t, label=label):
                return -o.logits[0].log_softmax(-1)[t, label]

            p = float(model(input_ids=window).logits[0, t].detach().softmax(-1)[label])
            for name, (_, g) in brute_force(model, window, mapped.layers, loss).items():
                exact[name] = exact[name] + p * (g * g).sum(0) / 3
    draws = [
        collect_statistics(model, mapped, call, window.expand(30, 3), batch_size=30, first_window=start)
        for start in range(0, 900, 30)
    ]
    text = collect_statistics(model, mapped, call, window, labels="text")
    differs = 0
    for source, first in draws[0].items():
        for name in first.layers:
            means = torch.stack([part[source].squares(name) for part in draws])
            error = means.std(0) / len(draws) ** 0.5
            off = (means.mean(0) - exact[name]).abs()
            assert bool((off < 6 * error + 1e-12).all()), name
            assert bool((error < 0.3 * exact[name]).all()), "too few draws to tell anything"
            differs += int(((text[source].squares(name) - exact[name]).abs() > 6 * error).sum())
    assert differs > 20  # the same bound refuses the empirical Fisher


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "bert"])
def test_batch_size_and_order_of_the_windows_change_nothing_but_rounding(architecture):
    one, three = collect(architecture, batch_size=1), collect(architecture, batch_size=3)
    for source, statistics in one.items():
        other = three[source]
        torch.testing.assert_close(other.weighted_gram().matrix, statistics.weighted_gram().matrix)
        torch.testing.assert_close(other.gram.matrix, statistics.gram.matrix)


def test_a_batch_is_divided_when_its_logits_would_be_too_large(monkeypatch):
    sizes = []
    model, windows, call, mapped = ready("llama")
    monkeypatch.setattr("cospadi.calibration.sensitivity._MAX_LOGITS", 2 * 12 * 96 + 5)
    progress = []
    collect_statistics(
        model,
        mapped,
        lambda w: sizes.append(len(w)) or call(w),
        windows,
        progress=lambda *done: progress.append(done),
    )
    assert sizes == [2, 2, 1]
    # Two blocks forth, the head and the loss, two blocks back, which cost more.
    assert [step[:2] for step in progress] == [(done, 5) for done in range(1, 6)]
    work = [step[2] for step in progress]
    assert work == sorted(work)
    assert work[-1] == pytest.approx(progress[0][3])
    steps = [later - before for before, later in zip([0.0, *work], work, strict=False)]
    assert steps[0] == steps[1] < steps[3] == pytest.approx(steps[4])


def test_the_parts_of_two_workers_merge_into_the_whole():
    model, windows, call, mapped = ready("mixtral")
    whole = collect_statistics(model, mapped, call, windows, **EVERYTHING)
    left = collect_statistics(model, mapped, call, windows[:3], **EVERYTHING)
    right = collect_statistics(model, mapped, call, windows[3:], first_window=3, **EVERYTHING)
    for source, statistics in whole.items():
        left[source].merge(right[source])
        assert left[source].n_tokens == statistics.n_tokens
        torch.testing.assert_close(left[source].gram.matrix, statistics.gram.matrix)
        torch.testing.assert_close(left[source].weighted_gram().matrix, statistics.weighted_gram().matrix)
        for name, sensitivity in statistics.layers.items():
            assert left[source].layers[name].n_tokens == sensitivity.n_tokens
            torch.testing.assert_close(left[source].squares(name), statistics.squares(name))


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_labels():
    first, again, other = (collect("llama", torch.float32, seed=seed) for seed in (0, 0, 1))
    for source, statistics in first.items():
        assert torch.equal(again[source].weighted_gram().matrix, statistics.weighted_gram().matrix)
        for name in statistics.layers:
            assert torch.equal(again[source].squares(name), statistics.squares(name))
            assert not torch.allclose(other[source].squares(name), statistics.squares(name), rtol=1e-3)


@pytest.mark.parametrize("architecture", ["llama-tied", "mixtral", "gpt2", "bert"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_out_as_it_went_in(architecture, fails):
    model, windows, call, mapped = ready(architecture)
    model.train()
    model.get_submodule(mapped.blocks[1]).eval()
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    generator = torch.get_rng_state()

    def stop(*done):
        raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            collect_statistics(model, mapped, call, windows, progress=stop, **EVERYTHING)
    else:
        collect_statistics(model, mapped, call, windows, **EVERYTHING)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_dropout_is_inactive_and_a_caller_without_gradients_is_served():
    model, windows, call, mapped = ready("bert")
    assert model.config.hidden_dropout_prob > 0
    quiet = collect_statistics(model, mapped, call, windows)
    model.train()
    with torch.no_grad():
        found = collect_statistics(model, mapped, call, windows)
    for source, statistics in quiet.items():
        for name in statistics.layers:
            assert torch.equal(found[source].squares(name), statistics.squares(name))


def test_no_activations_of_two_blocks_or_of_two_batches_are_alive():
    """What autograd saves inside the blocks is that of one block and one batch at a time."""
    model, windows, call, mapped = ready("llama")
    alive = most = 0

    class Saved:
        def __init__(self, tensor):
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.numel()
            most = max(most, alive)

        def __del__(self):
            nonlocal alive
            alive -= self.tensor.numel()

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        with frozen(model):
            call(windows[:2]).logits.sum()
            block = model.model.layers[0]
            hidden = torch.zeros(2, windows.shape[1], 32, requires_grad=True)
            rotary = model.model.rotary_emb(hidden, torch.arange(windows.shape[1])[None])
            most = 0
            outputs = block(hidden, position_embeddings=rotary)
            one_block, most = most, 0
            del outputs
        collect_statistics(model, mapped, call, windows, batch_size=2, **EVERYTHING)
    # The weighted Gram saves the inputs of the layers too, and the head and its logits count.
    assert one_block < most < 2 * one_block


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_that_are_not_finite_name_the_layer(weighted):
    model, windows, call, mapped = ready("llama")
    layer = model.model.layers[1].self_attn.o_proj

    def spoil(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: g * float("nan"))

    handle = layer.register_forward_hook(spoil)
    with pytest.raises(NumericalError, match=r"layers\.1\.self_attn\.o_proj: the gradient"):
        collect_statistics(model, mapped, call, windows, weighted=weighted)
    handle.remove()
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())


def test_activations_and_logits_that_are_not_finite_are_named():
    model, windows, call, mapped = ready("llama")
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(NumericalError, match="logits"):
        collect_statistics(model, mapped, call, windows)
    model.model.layers[0].mlp.up_proj.weight.data[0] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.0\.mlp\.down_proj"):
        collect_statistics(model, mapped, call, windows)


class Odd(torch.nn.Module):
    """A model whose only block calls one layer twice and two layers of one source in crossed order."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.unused = (torch.nn.Linear(6, 6) for _ in range(4))

        def forward(self, x, reverse=False):
            y = x.flip(0) * 2
            pairs = [(self.a, x), (self.a, y), (self.b, x), (self.b, y)]
            total = sum(layer(value).tanh() * (i + 1) for i, (layer, value) in enumerate(pairs))
            self.unused(x)
            return self.c(total) + total

    def __init__(self):
        super().__init__()
        self.embedding, self.blocks = torch.nn.Embedding(96, 6), torch.nn.ModuleList([self.Block(), self.Block()])

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return tf.modeling_outputs.BaseModelOutput(last_hidden_state=x)

    def can_generate(self):
        return False

    def get_output_embeddings(self):
        return None


def test_layers_that_run_twice_in_crossed_order_or_for_nothing():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Odd().double()
    windows, call = token_windows(2, 4), forward_call(model, CPU)
    mapped = map_model(model, lambda: call(windows))
    assert {layer.source for layer in mapped.layers if layer.kind in "abunused"} == {"blocks.0.a", "blocks.1.a"}
    found = collect_statistics(model, mapped, call, windows, batch_size=1, **EVERYTHING)
    used = [layer for layer in mapped.layers if layer.kind != "unused"]
    expected = brute_force(model, windows, used, lambda m, o, i, w: drawn_loss(m, o, i, 0))
    for block in range(2):
        statistics = found[f"blocks.{block}.a"]
        (x, ga), (_, gb) = expected[f"blocks.{block}.a"], expected[f"blocks.{block}.b"]
        assert statistics.layers[f"blocks.{block}.a"].n_tokens == 2 * windows.numel()
        torch.testing.assert_close(statistics.gram.matrix, x.T @ x)
        torch.testing.assert_close(statistics.squares(f"blocks.{block}.a"), (ga * ga).sum(0) / windows.numel())
        w = (ga * ga).sum(1) + (gb * gb).sum(1)
        torch.testing.assert_close(statistics.weighted_gram().matrix, x.T @ (x * (w / w.mean())[:, None]))
        assert statistics.layers[f"blocks.{block}.unused"].n_tokens == windows.numel()
        assert not statistics.squares(f"blocks.{block}.unused").any()


def test_grams_are_those_of_the_forward_pass_and_nothing_is_collected_unasked():
    model, windows, call, mapped = ready("mixtral", torch.float32)
    found = collect_statistics(model, mapped, call, windows)
    widths = {layer.source: layer.in_features for layer in mapped.layers}
    with GramCollector({name: model.get_submodule(name) for name in widths}, widths) as plain, torch.no_grad():
        call(windows)
    grams = plain.statistics
    assert set(found) == set(grams)
    for source, gram in grams.items():
        assert found[source].gram.n_tokens == gram.n_tokens
        torch.testing.assert_close(found[source].gram.matrix, gram.matrix, rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match="was not collected"):
            found[source].weighted_gram()


def test_a_map_of_some_layers_gives_their_part():
    model, windows, call, mapped = ready("llama")
    part = map_model(model, lambda: call(windows[:1]), include=["*.k_proj", "*.v_proj"])
    whole = collect_statistics(model, mapped, call, windows, weighted=True)
    found = collect_statistics(model, part, call, windows, weighted=True)
    assert list(found) == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 0)]
    for source, statistics in found.items():
        assert list(statistics.layers) == [source.replace("q_proj", kind) for kind in ("k_proj", "v_proj")]
        torch.testing.assert_close(statistics.gram.matrix, whole[source].gram.matrix)
        for name in statistics.layers:
            torch.testing.assert_close(statistics.squares(name), whole[source].squares(name))


def test_wrong_requests_are_refused():
    model, windows, call, mapped = ready("bert")
    with pytest.raises(UsageError, match="unknown labels 'true'"):
        collect_statistics(model, mapped, call, windows, labels="true")
    with pytest.raises(UsageError, match="does not predict"):
        collect_statistics(model, mapped, call, windows, labels="text")
    with pytest.raises(UsageError, match="windows need a shape"):
        collect_statistics(model, mapped, call, windows[:0])
    assert "Gaussian" in next(iter(collect_statistics(model, mapped, call, windows).values())).note
