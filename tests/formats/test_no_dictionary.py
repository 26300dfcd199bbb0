"""Weights that are sparse themselves: the dictionary is the identity, dtype ``none``, and is not stored."""

import copy
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cospadi
from cospadi.backends.base import BACKENDS
from cospadi.backends.sparse_linear import build_group
from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.base import FORMATS
from cospadi.formats.checkpoint import CheckpointConfig, ShardWriter
from cospadi.formats.dictionary import (
    dictionary_bits,
    dictionary_dtype_of,
    dictionary_layout,
    dictionary_tensors,
    held_dictionary,
    identity_dictionary,
    pack_dictionary,
    packed_dictionary,
    unpack_dictionary,
)
from cospadi.formats.factorization import GroupSpec, SparseFactorization
from cospadi.formats.packing import group_bits, pack_group, unpack_group
from cospadi.formats.verify import verify_checkpoint
from cospadi.pipeline.stages import compress
from cospadi.recipe.options import CalibrationConfig, CompressionConfig
from tests.backends.backend_cases import DTYPES, STORED, check_product, poisoned_memory
from tests.helpers import outputs, tiny_model, token_windows

WIDTHS = (13, 5)


def matrices(width=37, widths=WIDTHS, density=0.4, seed=0):
    """Sparse weights (width, out) by member; in the second one an input and an output that nothing uses."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for index, out in enumerate(widths):
        drawn = torch.randn(width, out, generator=generator)
        values = torch.where(drawn < 0, -1.0, 1.0) * (drawn.abs() + 0.1)
        found[f"m{index}"] = values * (torch.rand(width, out, generator=generator) < density)
    last = found[f"m{len(widths) - 1}"]
    last[width // 2], last[:, -1] = 0, 0
    return found


def pack(weights, format="bitmask", value_dtype="bfloat16", biases=None, shared=True):
    width = next(iter(weights.values())).shape[0]
    factors = SparseFactorization(torch.eye(width), weights)
    return pack_group(factors, format, value_dtype, biases or {}, shared, "none")


def build(weights, backend="torch", **options):
    spec, tensors = pack(weights, **options)
    layers = build_group(spec, backend)
    for name, layer in layers.items():
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        layer.load_state_dict(own)
    return spec, tensors, layers


def stored_weights(spec, tensors):
    found = unpack_group(spec, tensors)
    return {member.name: found.to_dense(member.name, torch.float64) for member in spec.members}


# The dictionary itself


def test_it_has_no_tensors_and_no_bits():
    assert dictionary_layout(7, 7, "none") == {}
    assert dictionary_bits(7, 7, "none") == 0
    packed = pack_dictionary(torch.eye(7, dtype=torch.bfloat16), "none")
    for held in (packed, identity_dictionary(7), held_dictionary({}, 7, "none"), packed_dictionary({}, 7, 7, "none")):
        assert held.is_identity
        assert held.in_features == 7
        assert dictionary_tensors(held) == {}
        assert torch.equal(unpack_dictionary(held), torch.eye(7))
    assert not pack_dictionary(torch.eye(7), "bfloat16").is_identity
    assert identity_dictionary(7, "meta").values.is_meta


OTHERS = {
    "another diagonal": 2 * torch.eye(4),
    "too many rows": torch.eye(5, 4),
    "too many columns": torch.eye(4, 5),
    "something beside it": torch.eye(4) + 1e-6 * torch.eye(4).roll(1, dims=1),
    "another order": torch.eye(4).flip(0),
    "another sign": -torch.eye(4),
    "zeros": torch.zeros(4, 4),
    "not a number": torch.eye(4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_dictionaries_are_refused(what):
    with pytest.raises(UsageError, match="'none' is for the identity: choose another one"):
        pack_dictionary(OTHERS[what], "none")
    D = OTHERS[what]
    with pytest.raises(UsageError, match="is for the identity"):
        pack_group(SparseFactorization(D, {"m": torch.ones(D.shape[1], 3)}), "bitmask", "bfloat16", {}, True, "none")


def test_what_does_not_go_with_it_is_refused():
    with pytest.raises(UsageError, match="not 3 atoms of 4"):
        dictionary_bits(3, 4, "none")
    with pytest.raises(UsageError, match="none has no scales"):
        pack_dictionary(torch.eye(3), "none", torch.ones(3))
    # Nothing at all would be stored.
    with pytest.raises(UsageError, match="'none' does not go with format 'identity'"):
        pack_group(SparseFactorization(torch.eye(3), {"m": torch.eye(3)}), "identity", "none", {}, True, "none")
    turned = SparseFactorization(torch.eye(3), {"m": torch.ones(3, 3)}, side="output")
    with pytest.raises(UsageError, match="'none' does not go with format 'bitmask' on side 'output'"):
        pack_group(turned, "bitmask", "bfloat16", {}, True, "none")
    # It is never what a value dtype brings along.
    assert "none" not in {dictionary_dtype_of(dtype) for _, dtype in STORED}


# Groups


@pytest.mark.parametrize(("format", "value_dtype"), STORED)
def test_weights_survive_packing_exactly_once_rounded(format, value_dtype):
    spec, tensors = pack(matrices(), format, value_dtype)
    assert GroupSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.n_atoms, spec.in_features, spec.dictionary_dtype) == (37, 37, "none")
    assert not [name for name in tensors if "dictionary" in name]
    found = unpack_group(spec, tensors)
    assert torch.equal(found.dictionary, torch.eye(37))
    again = pack_group(found, format, value_dtype, {}, True, "none")
    assert again[0] == spec
    assert set(again[1]) == set(tensors)
    assert all(torch.equal(again[1][name], tensors[name]) for name in tensors)
    # Rounded as coefficients are, and zero where they were.
    codec = FORMATS.create(format)
    for name, W in matrices().items():
        rounded = codec.unpack(codec.pack(W, value_dtype))
        assert torch.equal(found.to_dense(name), rounded.float())
        assert not found.to_dense(name)[W == 0].any()
        if value_dtype == "float32":
            assert torch.equal(found.to_dense(name), W)


@settings(deadline=None, max_examples=40)
@given(
    stored=st.sampled_from(STORED),
    width=st.integers(1, 40),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_bits_are_those_that_are_counted(stored, width, widths, density, seed):
    format, value_dtype = stored
    weights = matrices(width, tuple(widths), density, seed)
    codec = FORMATS.create(format)
    spec, tensors = pack(weights, format, value_dtype)
    counted = sum(
        codec.bits(width, out, member.n_stored, value_dtype) for out, member in zip(widths, spec.members, strict=True)
    )
    bits = 8 * sum(tensor.nbytes for tensor in tensors.values())
    assert 0 <= bits - counted < 8 * len(widths)  # strings end in whole bytes
    if density == 1.0 and len(widths) == 1:
        weights = {"m0": torch.ones(width, widths[0])}
        spec, tensors = pack(weights, format, value_dtype)
        expected = group_bits(width, width, widths, width, codec, value_dtype, "none")
        assert 0 <= 8 * sum(tensor.nbytes for tensor in tensors.values()) - expected < 8


def checkpoint(folder, change=lambda group: None):
    spec, tensors = pack(matrices(), biases={"m0": torch.ones(13)})
    with ShardWriter(folder) as writer:
        writer.add("m", tensors)
    config = CheckpointConfig((spec,)).to_dict()
    change(config["groups"][0])
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_a_checkpoint_is_verified(tmp_path):
    (spec,) = verify_checkpoint(checkpoint(tmp_path)).groups
    assert (spec.format, spec.dictionary_dtype, len(spec.members)) == ("bitmask", "none", 2)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g.update(n_atoms=36), "is the identity, not 36 atoms of 37"),
        (lambda g: g.update(in_features=36), "is the identity, not 37 atoms of 36"),
        (lambda g: g.update(format="identity", value_dtype="none"), "one layer in a group"),
        (lambda g: (g["members"].pop(), g.update(format="identity", value_dtype="none")), "'none' does not go with"),
        (lambda g: (g["members"].pop(), g.update(side="output")), "'none' does not go with format 'bitmask'"),
        (lambda g: g.update(dictionary_dtype="None"), "is no dtype of a dictionary"),
        (lambda g: g.update(value_dtype="none"), "does not store 'none' values"),
    ],
)
def test_a_hostile_description_is_refused(tmp_path, change, text):
    config = CheckpointConfig((pack(matrices())[0],)).to_dict()
    change(config["groups"][0])
    with pytest.raises(CheckpointError, match=text):
        CheckpointConfig.from_dict(json.loads(json.dumps(config)))
    with pytest.raises(CheckpointError, match=text):
        verify_checkpoint(checkpoint(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g.update(dictionary_dtype="bfloat16"), "m0.dictionary"),
        (lambda g: g.update(n_atoms=41, in_features=41), "m0"),
        (lambda g: g["members"][0].update(n_stored=1), "m0"),
    ],
)
def test_a_description_of_other_tensors_is_refused(tmp_path, change, text):
    with pytest.raises(CheckpointError, match=text):
        verify_checkpoint(checkpoint(tmp_path, change))


def test_a_dictionary_that_nobody_asked_for_is_refused(tmp_path):
    spec, tensors = pack(matrices())
    with ShardWriter(tmp_path) as writer:
        writer.add("m", {**tensors, "m0.dictionary": torch.eye(37)})
    config = CheckpointConfig((spec,)).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(CheckpointError, match="dictionary"):
        verify_checkpoint(tmp_path)


# Layers


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "auto"])
@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8", "float32"])
@pytest.mark.parametrize("shared", [True, False])
def test_backends_multiply_as_float64_does(backend, value_dtype, shared):
    state = BACKENDS.availability(backend)
    if not state:
        pytest.skip(state.reason)
    biases = {"m1": torch.arange(5.0)}
    spec, tensors, layers = build(matrices(), backend, value_dtype=value_dtype, shared=shared, biases=biases)
    W = stored_weights(spec, tensors)
    identity = torch.eye(37, dtype=torch.float64)
    for dtype in DTYPES if backend != "cpu" else (torch.float32, torch.bfloat16):
        for n_tokens in (1, 3, 40):
            x = torch.randn(n_tokens, 37, generator=torch.Generator().manual_seed(n_tokens)).to(dtype)
            with poisoned_memory(), torch.no_grad():
                found = {name: layer(x) for name, layer in layers.items()}
            check_product(x, identity, W["m0"], found["m0"])
            without = found["m1"].double() - biases["m1"].double()
            if dtype in (torch.float32, torch.float64):
                check_product(x, identity, W["m1"], without.to(dtype))
            assert found["m1"].shape == (n_tokens, 5)


@pytest.mark.parametrize(("format", "value_dtype"), STORED)
def test_every_format_and_dtype_runs(format, value_dtype):
    spec, tensors, layers = build(matrices(), "auto", format=format, value_dtype=value_dtype)
    W = stored_weights(spec, tensors)
    x = torch.randn(2, 3, 37, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, layer in layers.items():
            y = layer(x)
            assert y.shape == (2, 3, W[name].shape[1])
            check_product(x.reshape(6, 37), torch.eye(37, dtype=torch.float64), W[name], y.reshape(6, -1))


@pytest.mark.parametrize(
    ("format", "compiled"), [("bitmask", False), ("csr", False), ("dense", False), ("bitmask", True)]
)
def test_gradients_are_those_of_plain_torch(format, compiled):
    torch._dynamo.reset()
    spec, tensors, layers = build(matrices(), format=format, value_dtype="float32")
    block = nn.ModuleDict(layers)
    for layer in layers.values():
        layer.values.requires_grad_()

    def call(x):
        return torch.cat([layer(x) for layer in block.values()], dim=-1)

    run = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
    W = [w.requires_grad_() for w in stored_weights(spec, tensors).values()]
    x = torch.randn(4, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    g = torch.randn(4, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    own, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    (reference @ torch.cat(W, dim=1)).backward(g)
    run(own).backward(g)
    torch.testing.assert_close(own.grad, reference.grad, rtol=1e-10, atol=1e-10)
    for layer, w in zip(layers.values(), W, strict=True):
        wanted = w.grad.T if format == "dense" else w.grad.T[w.detach().T != 0]
        torch.testing.assert_close(layer.values.grad.double(), wanted, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


def test_compiled_exported_and_traced_layers_give_the_same():
    torch._dynamo.reset()
    _, _, layers = build({"m0": matrices()["m0"]}, "cpu")
    layer, x = layers["m0"], torch.randn(6, 37, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        y = layer(x)
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), y)
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
        assert torch.equal(torch.jit.trace(layer, (x,), check_trace=False)(x), y)
    torch._dynamo.reset()


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8", "float16", "bfloat14"])
def test_layers_multiply_out(value_dtype):
    spec, tensors, layers = build(matrices(), value_dtype=value_dtype)
    W = stored_weights(spec, tensors)
    for name, layer in layers.items():
        for dtype in (torch.float32, torch.float64):
            dense = layer.to_dense(dtype)
            assert dense.dtype == dtype
            assert torch.equal(dense, W[name].T.to(dtype))
        module = layer.to_dense_module()
        assert type(module) is nn.Linear
        # In the dtype of the values where that is one to compute with.
        assert module.weight.dtype == {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
            value_dtype, torch.float32
        )
        assert torch.equal(module.weight.double(), W[name].T)
        assert layer.to_dense_module(torch.float64).weight.dtype == torch.float64
        assert layer.device == torch.device("cpu")
        assert "dictionary_dtype=none" in repr(layer)


def test_layers_have_no_dictionary_to_train_or_save():
    _, _, layers = build(matrices(), biases={"m0": torch.ones(13)})
    for layer in layers.values():
        assert layer.dictionary_names == ()
        assert "dictionary" not in layer.state_dict()
        assert layer.packed_dictionary().is_identity
    assert set(layers["m0"].state_dict()) == {"values", "mask", "bias"}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_copies_are_layers_of_their_own(again):
    _, _, layers = build(matrices())
    block = nn.ModuleDict(layers)
    x = torch.randn(3, 37, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        before = {name: layer(x) for name, layer in block.items()}
        other = again(block)
        assert all(torch.equal(layer(x), before[name]) for name, layer in other.items())
        other["m0"].values.zero_()
        assert not other["m0"](x).any()
        assert torch.equal(block["m0"](x), before["m0"])
        # Half precision is for the bias alone; what is stored stays.
        assert block.half()["m0"].values.dtype == torch.bfloat16
        assert torch.equal(block["m0"](x), before["m0"])


def test_sparse_weights_compress_and_load(tmp_path):
    config = CompressionConfig(
        ratio=0.3,
        storage="factors",
        dictionary="identity",
        solver="htp",
        solver_options={"n_iter": 1},
        calibration=CalibrationConfig(batch_size=2),
        include=("*layers.0*",),
    )
    report = compress(tiny_model("llama"), tmp_path / "out", config, windows=token_windows())
    assert {row["kind"] for row in report["groups"]} == {"sparse"}
    assert {row["dictionary_dtype"] for row in report["groups"]} == {"none"}
    verify_checkpoint(tmp_path / "out")
    loaded = cospadi.load(tmp_path / "out", backend="auto", dtype=torch.float32)
    reference = cospadi.load(tmp_path / "out", backend="reference", dtype=torch.float32)
    windows = token_windows()
    torch.testing.assert_close(outputs(loaded, windows), outputs(reference, windows), rtol=1e-4, atol=1e-4)
    dense = tiny_model("llama").to(torch.float32)
    moved = (outputs(loaded, windows) - outputs(dense, windows)).norm() / outputs(dense, windows).norm()
    assert 0 < moved < 0.5
