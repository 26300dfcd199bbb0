"""The compressed layer as a torch module, and layers that share a dictionary."""

import copy

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


def packed(*stored):
    """Pack one group by format, value dtype and dictionary dtype, or a layer that is only quantised for each member."""
    generator = torch.Generator().manual_seed(0)
    biases = {name: torch.randn(width, generator=generator) for name, width in MEMBERS.items()}
    if len(stored) == 3:
        format, value_dtype, dictionary_dtype = stored
        fields = {"biases": biases, "dictionary_dtype": dictionary_dtype}
        return [random_group(MEMBERS, 7, 10, generator, format, value_dtype, **fields)]
    factors = [SparseFactorization.of_weight(m, torch.randn(7, w, generator=generator)) for m, w in MEMBERS.items()]
    return [
        pack_group(one, "identity", "none", {name: biases[name]}, True, stored[0])
        for name, one in zip(MEMBERS, factors, strict=True)
    ]


def installed(groups, backend="reference"):
    model = Block()
    install(model, CheckpointConfig(tuple(spec for spec, _ in groups)), backend=backend)
    model.load_state_dict(tensors_of(groups))
    return model


def tensors_of(groups):
    return {key: tensor for _, tensors in groups for key, tensor in tensors.items()}


def expected(groups, x):
    weights = {}
    for spec, tensors in groups:
        factors = unpack_group(spec, tensors)
        weights |= {member.name: factors.to_dense(member.name, torch.float64) for member in spec.members}
    tensors = tensors_of(groups)
    return torch.cat([x.double() @ weights[m] + tensors[f"{m}.bias"].double() for m in MEMBERS], dim=-1)


def tokens(dtype=torch.float32, seed=3):
    return torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def groups():
    return packed("bitmask", "float32", None)


@pytest.fixture
def block(groups):
    return installed(groups)


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


# Laws of every stored form

STORED = [
    ("bitmask", "float32", None),
    ("csr", "int8", None),
    ("bitmask", "int4", "int4g32"),
    ("dense", "int6", "int3g64"),
    ("bfloat16",),
    ("int4g32",),
]
every_stored = pytest.mark.parametrize("stored", STORED, ids=lambda p: "-".join(map(str, p)))


@every_stored
def test_layers_compute_in_the_dtype_of_x(stored):
    groups = packed(*stored)
    block = installed(groups, "auto" if len(stored) == 1 else "reference")
    assert {name: (t.shape, t.dtype) for name, t in block.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in tensors_of(groups).items()
    }
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x = tokens(dtype)
        with torch.no_grad():
            y = block(x)
            assert torch.equal(copy.deepcopy(block)(x), y)
        reference = expected(groups, x)
        assert y.dtype == dtype
        assert (y.double() - reference).norm() / reference.norm() < tolerance


@every_stored
def test_conversions_keep_the_stored_factors_exactly(stored):
    groups = packed(*stored)
    block, held = installed(groups), tensors_of(groups)
    with torch.no_grad():
        before = block(tokens(torch.float64))
        converted = copy.deepcopy(block).to(torch.bfloat16)
        assert {layer.bias.dtype for layer in converted.children()} == {torch.bfloat16}
        for name, tensor in converted.state_dict().items():
            if not name.endswith("bias"):
                assert tensor.dtype == held[name].dtype
                assert torch.equal(tensor, held[name])
        assert torch.allclose(converted(tokens(torch.float64)), before, atol=1e-1)
        assert torch.equal(block.double().float()(tokens(torch.float64)), before)


@every_stored
def test_layers_move_load_and_compile(stored):
    groups = packed(*stored)
    block = installed(groups)
    with torch.no_grad():
        before = block(tokens())
        block.to("meta")
        assert {tensor.device.type for tensor in block.state_dict().values()} == {"meta"}
        block.load_state_dict(tensors_of(groups), assign=True)
        assert torch.equal(block(tokens()), before)
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(tokens()), before)


@every_stored
def test_gradients_reach_x_through_every_member(stored):
    groups = packed(*stored)
    block = installed(groups)
    x, reference = tokens(torch.float64).requires_grad_(), tokens(torch.float64).requires_grad_()
    weights = torch.arange(15.0, dtype=torch.float64)
    (block(x) * weights).sum().backward()
    (expected(groups, reference) * weights).sum().backward()
    torch.testing.assert_close(x.grad, reference.grad)
    assert all(parameter.grad is None for parameter in block.parameters())


@every_stored
def test_layers_become_dense_ones(stored):
    groups = packed(*stored)
    block = installed(groups)
    with torch.no_grad():
        x, before = tokens(), block(tokens())
        for spec, tensors in groups:
            factors = unpack_group(spec, tensors)
            for member in spec.members:
                weight = block.get_submodule(member.name).to_dense(torch.float64)
                wanted = factors.to_dense(member.name, torch.float64)
                torch.testing.assert_close(weight.T, wanted, rtol=1e-12, atol=1e-12)
        dense = block.k.to_dense_module(torch.float32)
        torch.testing.assert_close(dense(x), before[..., 6:10], rtol=1e-4, atol=1e-5)
        assert block.k.to_dense_module(torch.bfloat16).weight.dtype == torch.bfloat16
        restore_dense(block, torch.float32)
        assert {type(layer) for layer in block.children()} == {nn.Linear}
        torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)


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


# Layers that share a dictionary


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


def test_nothing_is_shared_when_members_have_inputs_of_their_own(products):
    spec, tensors = random_group(MEMBERS, 7, 10, torch.Generator().manual_seed(0), shared=False)
    model = Block(bias=False)
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    with torch.no_grad():
        model(tokens())
    assert products == [0, 0, 0]


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


def test_scales_of_one_layer_and_of_the_dictionary_are_independent():
    quantised = installed(packed("bitmask", "int8", "int8"))
    with torch.no_grad():
        bias = torch.cat([layer.bias for layer in quantised.children()])
        before = quantised(tokens())
        other = copy.deepcopy(quantised)
        other.q.dictionary_scales.mul_(2)
        other.k.scales.mul_(2)
        factors = torch.tensor([2.0] * 6 + [4.0] * 4 + [2.0] * 5)
        torch.testing.assert_close(other(tokens()) - bias, factors * (before - bias))
        assert torch.equal(quantised(tokens()), before)
        other.k.scales[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"k\.scales"):
        other(tokens())


# Making, installing and refusing


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


def test_dense_modules_come_back_in_the_class_that_was_replaced(groups):
    from transformers.pytorch_utils import Conv1D

    spec, tensors = groups[0]
    model = Block()
    model.k = Conv1D(4, 7)
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    with torch.no_grad():
        before = model(tokens())
        restore_dense(model)
        assert [type(layer) for layer in (model.q, model.k, model.v)] == [nn.Linear, Conv1D, nn.Linear]
        torch.testing.assert_close(model(tokens()), before, rtol=1e-4, atol=1e-5)


def test_the_bias_has_the_dtype_and_device_that_are_asked_for(groups):
    spec, _ = groups[0]
    layers = build_group(spec, device="meta", bias_dtype=torch.float16)
    assert {layer.bias.dtype for layer in layers.values()} == {torch.float16}
    assert {layer.bias.device.type for layer in layers.values()} == {"meta"}
    assert build_group(spec)["q"].bias.dtype == torch.float32
    one = SparseLinear(Group(spec, "torch"), spec.members[1])
    assert (one.owner, one.backend, one.out_features) == (one, "torch", 4)


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
def test_a_model_that_does_not_fit_the_description_is_refused(groups, change, text):
    model = Block()
    change(model)
    with pytest.raises(CheckpointError, match=text):
        install(model, CheckpointConfig((groups[0][0],)))
