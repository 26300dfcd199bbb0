"""The compressed layer as a torch module, and layers that share a dictionary."""

import copy
import pickle

import pytest
import torch
from torch import nn

from cospadi.backends.bundle import Group
from cospadi.backends.reference import ReferenceBackend
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.factorization import SparseFactorization
from cospadi.formats.checkpoint import CheckpointConfig
from cospadi.formats.packing import unpack_group
from cospadi.modules import SparseLinear, build_group, install, restore_dense, set_backend

from .checkpoints import random_group

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


@pytest.fixture(params=["bitmask", "csr", "dense"])
def eight_bit_group(request):
    biases = {name: torch.ones(width) for name, width in MEMBERS.items()}
    return random_group(MEMBERS, 7, 10, torch.Generator().manual_seed(0), request.param, "int8", biases)


@pytest.fixture
def eight_bit(eight_bit_group):
    spec, tensors = eight_bit_group
    model = Block()
    install(model, CheckpointConfig((spec,)), backend="reference")
    model.load_state_dict(tensors)
    return model


def test_eight_bit_factors_run_in_every_dtype(eight_bit, eight_bit_group):
    assert {name: (t.shape, t.dtype) for name, t in eight_bit.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in eight_bit_group[1].items()
    }
    assert [name for name, _ in eight_bit.named_parameters()] == ["q.bias", "k.bias", "v.bias"]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        x = tokens(dtype)
        with torch.no_grad():
            y = eight_bit(x)
        reference = expected(eight_bit_group, x)
        assert y.dtype == dtype
        assert (y.double() - reference).norm() / reference.norm() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_conversions_keep_eight_bit_factors_and_their_scales(eight_bit, eight_bit_group, dtype):
    with torch.no_grad():
        before = eight_bit(tokens(torch.float64))
        eight_bit.to(dtype)
        assert {eight_bit.q.bias.dtype, eight_bit.v.bias.dtype} == {dtype}
        for name, tensor in eight_bit.state_dict().items():
            if not name.endswith("bias"):
                assert tensor.dtype == eight_bit_group[1][name].dtype
                assert torch.equal(tensor, eight_bit_group[1][name])
        assert torch.equal(eight_bit(tokens(torch.float64)), before)  # the biases are ones


def test_eight_bit_factors_move_load_and_copy(eight_bit, eight_bit_group):
    with torch.no_grad():
        before = eight_bit(tokens())
        eight_bit.to("meta")
        assert {tensor.device.type for tensor in eight_bit.state_dict().values()} == {"meta"}
        eight_bit.load_state_dict(eight_bit_group[1], assign=True)
        assert torch.equal(eight_bit(tokens()), before)
        other = copy.deepcopy(eight_bit)
        other.q.dictionary_scales.mul_(2)
        other.k.scales.mul_(2)
        unbiased = before - 1
        after = other(tokens()) - 1
        torch.testing.assert_close(after[..., :6], 2 * unbiased[..., :6])
        torch.testing.assert_close(after[..., 6:10], 4 * unbiased[..., 6:10])
        assert torch.equal(eight_bit(tokens()), before)


def test_eight_bit_factors_become_dense_layers(eight_bit, eight_bit_group):
    factors = unpack_group(*eight_bit_group)
    with torch.no_grad():
        x, before = tokens(), eight_bit(tokens())
        for name in MEMBERS:
            weight = eight_bit.get_submodule(name).to_dense(torch.float64)
            torch.testing.assert_close(weight.T, factors.to_dense(name, torch.float64), rtol=1e-12, atol=1e-12)
        dense = eight_bit.k.to_dense_module()
        assert dense.weight.dtype == torch.float32
        torch.testing.assert_close(dense(x), before[..., 6:10], rtol=1e-4, atol=1e-5)
        assert eight_bit.k.to_dense_module(torch.bfloat16).weight.dtype == torch.bfloat16
        restore_dense(eight_bit)
        assert {type(layer) for layer in eight_bit.children()} == {nn.Linear}
        torch.testing.assert_close(eight_bit(x), before, rtol=1e-4, atol=1e-5)


def test_scales_that_no_writer_gives_name_the_layer(eight_bit):
    with torch.no_grad():
        eight_bit.k.scales[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"k\.scales"):
        eight_bit(tokens())


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
