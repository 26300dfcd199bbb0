"""The compressed layer as a torch module, and layers that share a dictionary."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cospadi.backends.bundle import Group
from cospadi.backends.reference import ReferenceBackend
from cospadi.backends.sparse_linear import SparseLinear, build_group, install, restore_dense, set_backend
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.formats.checkpoint import CheckpointConfig
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group

from ..checkpoints import random_group

MEMBERS = {"q": 6, "k": 4, "v": 5}


class Block(nn.Module):
    """Three layers that receive the same tensor."""

    def __init__(self, bias=True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(7, width, bias=bias) for width in MEMBERS.values())

    def forward(self, x):
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@pytest.fixture
def group():
    generator = torch.Generator().manual_seed(0)
    biases = {name: torch.randn(width, generator=generator) for name, width in MEMBERS.items()}
    return random_group(MEMBERS, 7, 10, generator, biases=biases)


@pytest.fixture
def block(group):
    spec, tensors = group
    model = Block()
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    return model


def expected(group, x):
    spec, tensors = group
    factors: SparseFactorization = unpack_group(spec, tensors)
    parts = [x.double() @ factors.to_dense(m, torch.float64) + tensors[f"{m}.bias"].double() for m in MEMBERS]
    return torch.cat(parts, dim=-1)


def tokens(dtype=torch.float32, seed=3):
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def products(monkeypatch):
    """Count the products: for each, the member that was asked for, None for all."""
    calls = []
    multiply = ReferenceBackend.multiply

    def counted(self, dictionary, coefficients, x, member):
        calls.append(member)
        return multiply(self, dictionary, coefficients, x, member)

    monkeypatch.setattr(ReferenceBackend, "multiply", counted)
    return calls


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_a_group_computes_its_layers_in_the_dtype_of_x(block, group, dtype, tolerance):
    x = tokens(dtype)
    with torch.no_grad():
        y = block(x)
    reference = expected(group, x)
    assert y.dtype == dtype
    assert (y.double() - reference).norm() / reference.norm() < tolerance


def test_members_of_a_group_share_one_product(block, products):
    x = tokens()
    with torch.no_grad():
        first = block(x)
        assert products == [None]
        block(tokens())  # equal numbers in another tensor: not shared with the first
        assert products == [None] * 2
        assert torch.equal(block(x), first)
        assert torch.equal(block(x), first)
        assert products == [None] * 4  # released each time all members had used it


def test_a_changed_input_is_multiplied_again(block, group, products):
    x = tokens()
    with torch.no_grad():
        block.q(x)
        x.mul_(2)
        k = block.k(x)
    assert products == [None] * 2
    torch.testing.assert_close(k.double(), expected(group, x)[..., 6:10], rtol=1e-4, atol=1e-5)


def test_nothing_is_shared_when_members_have_inputs_of_their_own(group, products):
    spec, tensors = random_group(MEMBERS, 7, 10, torch.Generator().manual_seed(0), shared=False)
    model = Block(bias=False)
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    with torch.no_grad():
        model(tokens())
    assert products == [0, 0, 0]


def test_inference_mode_gives_the_same_and_leaves_the_layer_usable(block, group):
    with torch.inference_mode():
        inside = block(tokens())
    x = tokens().requires_grad_()
    y = block(x)
    torch.testing.assert_close(inside, y)
    y.sum().backward()
    assert x.grad is not None


def test_gradients_reach_x_through_every_member(block, group):
    x = tokens(torch.float64).requires_grad_()
    weights = torch.arange(15.0, dtype=torch.float64)
    (block(x) * weights).sum().backward()
    reference = tokens(torch.float64).requires_grad_()
    (expected(group, reference) * weights).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    assert all(parameter.grad is None for parameter in block.parameters())


def test_gradients_after_a_pass_without_them(block):
    """Outputs that were computed without a graph must not be handed out where one is needed."""
    x = tokens()
    with torch.no_grad():
        block.q(x)
    x.requires_grad_()
    block.k(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_only_the_first_member_registers_the_dictionary(block):
    names = [name for name, _ in block.named_parameters()]
    assert [name for name in names if name.endswith("dictionary")] == ["q.dictionary"]
    assert len([m for m in block.modules() if isinstance(m, SparseLinear)]) == 3


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_independent(block, duplicate):
    with torch.no_grad():
        before = block(tokens())
        other = duplicate(block)
        assert other.k.owner is other.q
        other.q.dictionary.zero_()
        assert not torch.equal(other(tokens()), before)
        assert torch.equal(block(tokens()), before)


def test_conversions_keep_the_stored_factors_exactly(block, group):
    with torch.no_grad():
        before = block(tokens(torch.float64))
        converted = copy.deepcopy(block).to(torch.bfloat16)
        assert converted.q.bias.dtype == torch.bfloat16
        for name, tensor in converted.state_dict().items():
            if not name.endswith("bias"):
                assert torch.equal(tensor, group[1][name])
                assert tensor.dtype == group[1][name].dtype
        assert torch.allclose(converted(tokens(torch.float64)), before, atol=1e-1)
        assert torch.equal(block.double().float()(tokens(torch.float64)), before)


def test_moving_to_the_meta_device_moves_all_tensors(block):
    block.to("meta")
    assert {tensor.device.type for tensor in block.state_dict().values()} == {"meta"}


def test_state_dict_round_trip(block, group):
    spec, _ = group
    other = Block()
    install(other, CheckpointConfig((spec,)), backend="reference")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.q.mask.zero_()
        other.k.mask.zero_()
        other.v.mask.zero_()
        other.load_state_dict(block.state_dict())
        assert torch.equal(other(tokens()), block(tokens()))


@pytest.mark.parametrize("assign", [False, True])
def test_new_tensors_are_noticed(block, assign):
    with torch.no_grad():
        before = block(tokens())
        state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
        state["q.dictionary"] *= 2
        block.load_state_dict(state, assign=assign)
        bias = torch.cat([block.q.bias, block.k.bias, block.v.bias])
        torch.testing.assert_close(block(tokens()) - bias, 2 * (before - bias))
        block.k.values.mul_(3)
        torch.testing.assert_close(block(tokens())[..., 6:10] - block.k.bias, 6 * (before[..., 6:10] - block.k.bias))


def test_skeletons_on_the_meta_device_have_the_stored_dtypes():
    for format, value_dtype, expected_dtype in (
        ("bitmask", "bfloat14", torch.uint8),
        ("csr", "float16", torch.float16),
    ):
        spec, tensors = random_group({"a": 4, "b": 3}, 5, 6, torch.Generator().manual_seed(0), format, value_dtype)
        layers = build_group(spec, device="meta")
        found = {f"{name}.{key}": t for name, layer in layers.items() for key, t in layer.state_dict().items()}
        assert {k: (t.shape, t.dtype, t.device.type) for k, t in found.items()} == {
            k: (t.shape, t.dtype, "meta") for k, t in tensors.items()
        }
        assert layers["a"].values.dtype == expected_dtype


def test_dense_modules_come_back_in_the_class_that_was_replaced(group):
    from transformers.pytorch_utils import Conv1D

    spec, tensors = group
    model = Block()
    model.k = Conv1D(4, 7)
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    with torch.no_grad():
        before = model(tokens())
        restore_dense(model)
        assert [type(layer) for layer in (model.q, model.k, model.v)] == [nn.Linear, Conv1D, nn.Linear]
        torch.testing.assert_close(model(tokens()), before, rtol=1e-4, atol=1e-5)


WHOLE_NUMBERS = [
    *((format, "int8", None) for format in ("bitmask", "csr", "dense")),
    ("bitmask", "int4", "int4g32"),
    ("dense", "int6", "int3g64"),
]


@pytest.fixture(params=WHOLE_NUMBERS, ids=lambda p: "-".join(map(str, p)))
def quantised_group(request):
    format, value_dtype, dictionary_dtype = request.param
    biases = {name: torch.ones(width) for name, width in MEMBERS.items()}
    generator = torch.Generator().manual_seed(0)
    return random_group(MEMBERS, 7, 10, generator, format, value_dtype, biases, dictionary_dtype=dictionary_dtype)


@pytest.fixture
def quantised(quantised_group):
    spec, tensors = quantised_group
    model = Block()
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    return model


def test_quantised_factors_run_in_every_dtype(quantised, quantised_group):
    assert {name: (t.shape, t.dtype) for name, t in quantised.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in quantised_group[1].items()
    }
    assert [name for name, _ in quantised.named_parameters()] == ["q.bias", "k.bias", "v.bias"]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x = tokens(dtype)
        with torch.no_grad():
            y = quantised(x)
        reference = expected(quantised_group, x)
        assert y.dtype == dtype
        assert (y.double() - reference).norm() / reference.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversions_keep_quantised_factors_and_their_scales(quantised, quantised_group, dtype):
    with torch.no_grad():
        before = quantised(tokens(torch.float64))
        quantised.to(dtype)
        assert {quantised.q.bias.dtype, quantised.v.bias.dtype} == {dtype}
        for name, tensor in quantised.state_dict().items():
            if not name.endswith("bias"):
                assert tensor.dtype == quantised_group[1][name].dtype
                assert torch.equal(tensor, quantised_group[1][name])
        assert torch.equal(quantised(tokens(torch.float64)), before)  # the biases are ones


def test_quantised_factors_move_load_and_copy(quantised, quantised_group):
    with torch.no_grad():
        before = quantised(tokens())
        quantised.to("meta")
        assert {tensor.device.type for tensor in quantised.state_dict().values()} == {"meta"}
        quantised.load_state_dict(quantised_group[1], assign=True)
        assert torch.equal(quantised(tokens()), before)
        other = copy.deepcopy(quantised)
        other.q.dictionary_scales.mul_(2)
        other.k.scales.mul_(2)
        unbiased = before - 1
        after = other(tokens()) - 1
        torch.testing.assert_close(after[..., :6], 2 * unbiased[..., :6])
        torch.testing.assert_close(after[..., 6:10], 4 * unbiased[..., 6:10])
        assert torch.equal(quantised(tokens()), before)


def test_quantised_factors_become_dense_layers(quantised, quantised_group):
    factors = unpack_group(*quantised_group)
    with torch.no_grad():
        x, before = tokens(), quantised(tokens())
        for name in MEMBERS:
            weight = quantised.get_submodule(name).to_dense(torch.float64)
            torch.testing.assert_close(weight.T, factors.to_dense(name, torch.float64), rtol=1e-12, atol=1e-12)
        dense = quantised.k.to_dense_module()
        assert dense.weight.dtype == torch.float32
        torch.testing.assert_close(dense(x), before[..., 6:10], rtol=1e-4, atol=1e-5)
        assert quantised.k.to_dense_module(torch.bfloat16).weight.dtype == torch.bfloat16
        restore_dense(quantised)
        assert {type(layer) for layer in quantised.children()} == {nn.Linear}
        torch.testing.assert_close(quantised(x), before, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=["bfloat16", "float32", "int8", "int4g32", "int3g64"])
def whole_weights(request):
    """Layers that are only quantised: a group for each, by the name of its layer."""
    generator = torch.Generator().manual_seed(0)
    groups = {}
    for name, width in MEMBERS.items():
        weight, bias = torch.randn(7, width, generator=generator), torch.randn(width, generator=generator)
        factors = SparseFactorization.of_weight(name, weight)
        groups[name] = pack_group(factors, "identity", "none", {name: bias}, True, request.param)
    return groups


@pytest.fixture
def whole_block(whole_weights):
    model = Block()
    install(model, CheckpointConfig(tuple(spec for spec, _ in whole_weights.values())), backend="auto")
    model.load_state_dict({key: t for _, tensors in whole_weights.values() for key, t in tensors.items()})
    return model


def product_of(whole_weights, x):
    parts = []
    for name, (spec, tensors) in whole_weights.items():
        W = unpack_group(spec, tensors).to_dense(name, torch.float64)
        parts.append(x.double() @ W + tensors[f"{name}.bias"].double())
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_layers_that_are_only_quantised_run_convert_and_copy(whole_block, whole_weights, backend):
    set_backend(whole_block, backend)
    held = {name: tensor for name, tensor in whole_block.state_dict().items() if not name.endswith("bias")}
    assert {name.split(".")[1] for name in held} <= {"dictionary", "dictionary_scales"}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x = tokens(dtype)
        with torch.no_grad():
            y = whole_block(x)
            reference = product_of(whole_weights, x)
            assert y.dtype == dtype
            assert (y.double() - reference).norm() / reference.norm() < tolerance
            assert torch.equal(copy.deepcopy(whole_block)(x), y)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(whole_block, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(tokens()), whole_block(tokens()))
    converted = copy.deepcopy(whole_block).half().state_dict()
    assert all(torch.equal(converted[name], tensor) for name, tensor in held.items())


def test_gradients_reach_x_through_layers_that_are_only_quantised(whole_block, whole_weights):
    x, reference = tokens(torch.float64).requires_grad_(), tokens(torch.float64).requires_grad_()
    weights = torch.arange(15.0, dtype=torch.float64)
    (whole_block(x) * weights).sum().backward()
    (product_of(whole_weights, reference) * weights).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)


def test_gradients_reach_a_floating_weight_without_coefficients():
    spec, tensors = pack_group(
        SparseFactorization.of_weight("a", torch.randn(7, 4)), "identity", "none", {}, True, "float32"
    )
    layer = build_group(spec)["a"]
    layer.load_state_dict({"dictionary": tensors["a.dictionary"]})
    layer.dictionary.requires_grad_()
    x = tokens()
    layer(x).square().sum().backward()
    weight = tensors["a.dictionary"].clone().requires_grad_()
    nn.functional.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(layer.dictionary.grad, weight.grad)


def test_layers_that_are_only_quantised_become_dense_ones(whole_block, whole_weights):
    with torch.no_grad():
        x, before = tokens(), whole_block(tokens())
        for name, (spec, tensors) in whole_weights.items():
            W = unpack_group(spec, tensors).to_dense(name)
            assert torch.equal(whole_block.get_submodule(name).to_dense().T, W)
        restore_dense(whole_block, torch.float32)
        assert {type(layer) for layer in whole_block.children()} == {nn.Linear}
        torch.testing.assert_close(whole_block(x), before, rtol=1e-4, atol=1e-5)


def test_scales_that_no_writer_gives_name_the_layer(quantised):
    with torch.no_grad():
        quantised.k.scales[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"k\.scales"):
        quantised(tokens())


def test_the_bias_has_the_dtype_and_device_that_are_asked_for(group):
    spec, _ = group
    layers = build_group(spec, device="meta", bias_dtype=torch.float16)
    assert {layer.bias.dtype for layer in layers.values()} == {torch.float16}
    assert {layer.bias.device.type for layer in layers.values()} == {"meta"}
    assert build_group(spec)["q"].bias.dtype == torch.float32
    one = SparseLinear(Group(spec, "torch"), spec.members[1])
    assert (one.owner, one.backend, one.out_features) == (one, "torch", 4)


def test_a_compiled_block_gives_the_same(block):
    with torch.no_grad():
        before = block(tokens())
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens()), before)


def test_backends_are_exchanged_for_all_layers(block):
    with torch.no_grad():
        before = block(tokens())
        set_backend(block, "torch")
        assert {layer.backend for layer in (block.q, block.k, block.v)} == {"torch"}
        torch.testing.assert_close(block(tokens()), before)
    with pytest.raises(UsageError, match="unknown backend 'nosuch'"):
        set_backend(block, "nosuch")
    with pytest.raises(UsageError, match="no compressed layers"):
        set_backend(nn.Linear(2, 2), "torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the refusal on machines without a GPU")
def test_a_backend_that_cannot_run_is_refused_with_the_reason(block):
    with pytest.raises(UnavailableError, match="no CUDA GPU"):
        set_backend(block, "cuda")
    block.q.use_backend("cuda")
    with pytest.raises(UnavailableError, match="q: backend 'cuda' cannot run"):
        block.q(tokens())


def test_damaged_tensors_name_the_layer(block):
    with torch.no_grad():
        block.k.mask[0, 0] ^= 1
    with pytest.raises(CheckpointError, match=r"k\.values"):
        block(tokens())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: delattr(m, "k"), "no layer k"),
        (lambda m: setattr(m, "k", nn.Linear(7, 5)), "checkpoint describes"),
        (lambda m: setattr(m, "k", nn.Linear(7, 4, bias=False)), "checkpoint describes"),
        (lambda m: setattr(m, "k", nn.LayerNorm(4)), "LayerNorm, not a linear layer"),
    ],
)
def test_a_model_that_does_not_fit_the_description_is_refused(group, change, text):
    model = Block()
    change(model)
    with pytest.raises(CheckpointError, match=text):
        install(model, CheckpointConfig((group[0],)))
