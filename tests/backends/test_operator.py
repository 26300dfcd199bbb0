"""``cospadi::linear`` as torch sees it: compiled, exported and differentiated."""

import pytest
import torch
from torch import nn

from cospadi.formats.base import FORMATS
from tests.backends.backend_cases import Block, Case, check_product

pytestmark = pytest.mark.usefixtures("fresh_compiler")

LINEAR = torch.ops.cospadi.linear.default
BACKWARD = torch.ops.cospadi.linear_backward.default
F64 = torch.float64


def arguments(block, x, member):
    bundle = block.layers["m0"]._bundle
    stored = [getattr(layer, name) for layer in bundle.layers for name in layer.coefficient_names]
    owner = bundle.group.owner
    return x, [getattr(owner, name) for name in owner.dictionary_names], stored, bundle._handle, member


def trained(block):
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name.endswith(("values", "dictionary")))
    return block


def expected(block, x):
    """The product by plain torch in the dtype of x, with gradients to D and to S of every layer."""
    layers = list(block.layers.values())
    D = layers[0].owner.dictionary.detach().to(x.dtype).requires_grad_()
    S = [_unpacked(layer).to(x.dtype).requires_grad_() for layer in layers]
    return torch.cat([x @ D.T @ part for part in S], dim=-1), D, S


def _unpacked(layer):
    return FORMATS.create(layer.packed().format).unpack(layer.packed()).detach().clone()


# The operator's registrations


@pytest.mark.parametrize(("member", "value_dtype"), [(-1, "float32"), (1, "float32"), (-1, "int8")])
def test_the_operator_keeps_the_rules_of_torch(member, value_dtype):
    block = Block(Case(widths=(7, 5), n_atoms=19, in_features=11, value_dtype=value_dtype))
    for shape in ((2, 3, 11), (11,), (0, 11)):
        torch.library.opcheck(LINEAR, arguments(block, torch.randn(shape), member))
    if value_dtype == "float32":
        x = torch.randn(3, 11, requires_grad=True)
        torch.library.opcheck(LINEAR, arguments(trained(block), x, member))


def test_the_backward_operator_keeps_the_rules_of_torch(block):
    for member, width in ((-1, 21), (1, 5)):
        x, dictionary, stored, handle, _ = arguments(block, torch.randn(4, 11), member)
        wanted = [True, True, *(tensor.is_floating_point() for tensor in stored)]
        torch.library.opcheck(BACKWARD, (torch.randn(4, width), x, dictionary, stored, handle, member, wanted))


# Compiled and exported


def graph_nodes(block, *inputs):
    """Count the calls of the operator in what dynamo traces, which must be one graph."""
    nodes = []

    def keep(module, _):
        nodes.extend(n for n in module.graph.nodes if "cospadi" in str(n.target))
        return module

    y = torch.compile(block, backend=keep, fullgraph=True)(*inputs)
    return len(nodes), y


def test_a_compiled_group_is_one_node_without_an_eager_call_before(block, case, runs):
    x = case.x()
    with torch.no_grad():
        count, y = graph_nodes(block, x)
        assert count == 1
        assert runs == [-1]
        torch._dynamo.reset()
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            assert torch.equal(compiled(x), y)
        assert runs == [-1] * 4
        assert torch.equal(block(x), y)
    check_product(x, *case.stored(), y)


def test_a_compiled_block_takes_any_number_of_tokens(block, case):
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for n_tokens in (5, 3, 1, 17):
            x = Case(n_tokens, in_features=11).x()
            torch.testing.assert_close(compiled(x), block(x))


def test_compiled_layers_of_two_models_do_not_mix(case):
    """One function, compiled once for each model that it is given."""
    models = [Block(Case(6, 19, 11, (7, 5, 9), seed=seed)) for seed in range(2)]
    with torch.no_grad():
        compiled = torch.compile(lambda model, x: 2 * model(x), backend="aot_eager", fullgraph=True)
        x = case.x()
        for model in models * 2:
            torch.testing.assert_close(compiled(model, x), 2 * model(x))


def test_a_compiled_block_sees_new_values(block, case):
    compiled, x = torch.compile(block, backend="aot_eager", fullgraph=True), case.x()
    with torch.no_grad():
        before = compiled(x)
        block.layers["m1"].values.mul_(2)
        after = compiled(x)
        assert torch.equal(after[:, 7:12], 2 * before[:, 7:12])
        assert torch.equal(after[:, :7], before[:, :7])
        block.layers["m0"].dictionary = nn.Parameter(2 * block.layers["m0"].dictionary, requires_grad=False)
        torch.testing.assert_close(compiled(x), 2 * after)


def test_gradients_of_a_compiled_block(block, case):
    trained(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = []
    for run in (block, compiled):
        x = case.x().requires_grad_()
        block.zero_grad()
        run(x).square().sum().backward()
        found.append([x.grad, *(parameter.grad.clone() for parameter in block.parameters())])
    assert len(found[0]) == 5
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.slow
def test_the_default_compiler(block, case):
    with torch.no_grad():
        x = case.x()
        torch.testing.assert_close(torch.compile(block, fullgraph=True)(x), block(x))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_block_gives_the_same(block, case, strict):
    x = case.x()
    with torch.no_grad():
        exported = torch.export.export(block, (x,), strict=strict)
        nodes = [node for node in exported.graph.nodes if node.target is LINEAR]
        assert len(nodes) == 1
        assert torch.equal(exported.module()(x), block(x))


def test_a_traced_block_gives_the_same(case):
    block = Block(case, "cpu")
    with torch.no_grad():
        traced = torch.jit.trace(block, (case.x(),), check_trace=False)
        x = Case(6, in_features=11, seed=4).x()
        torch.testing.assert_close(traced(x), block(x))


# Gradients


@pytest.mark.parametrize(("format", "shared"), [("bitmask", True), ("bitmask", False), ("csr", True), ("dense", False)])
def test_gradients_are_those_of_plain_torch(format, shared):
    block = trained(Block(Case(6, 19, 11, (7, 5), format=format)))
    x, g = torch.randn(2, 3, 11, dtype=F64), torch.randn(2, 3, 12, dtype=F64)
    own, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted, D, S = expected(block, reference)
    wanted.backward(g)
    layers = list(block.layers.values())
    if shared:
        block(own).backward(g)
    else:
        for layer, part in zip(layers, g.split([7, 5], dim=-1), strict=True):
            layer(own).backward(part)
    torch.testing.assert_close(own.grad, reference.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layers[0].dictionary.grad.double(), D.grad, rtol=1e-6, atol=1e-6)
    for layer, part in zip(layers, S, strict=True):
        support = part.detach().T != 0
        to_values = part.grad.T[support] if format != "dense" else part.grad.T
        torch.testing.assert_close(layer.values.grad.double(), to_values, rtol=1e-6, atol=1e-6)


def test_gradients_go_only_where_they_are_wanted(block, case):
    block.layers["m1"].values.requires_grad_()
    block(case.x()).sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is not None] == ["layers.m1.values"]


def test_integer_factors_pass_gradients_to_x_alone():
    value_dtype = "bfloat14"
    block = Block(Case(6, 19, 11, (7, 5), value_dtype=value_dtype))
    for layer in block.layers.values():
        assert "values" in layer._buffers
        with pytest.raises(RuntimeError, match="floating point"):
            layer.values.requires_grad_()
    x = torch.randn(4, 11, dtype=F64, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    D, S = Case(6, 19, 11, (7, 5), value_dtype=value_dtype).stored()
    block(x).square().sum().backward()
    (reference @ D @ S).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-10, atol=1e-10)


def test_gradients_in_sixteen_bits_have_the_dtypes_of_their_tensors():
    block = trained(Block(Case(6, 19, 11, (7, 5), value_dtype="bfloat16")))
    x = torch.randn(4, 11, dtype=torch.bfloat16, requires_grad=True)
    block(x).sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert {parameter.grad.dtype for parameter in block.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("backend", "compiled"), [("torch", False), ("cpu", False), ("auto", True)])
def test_fine_tuning_lowers_the_loss_and_every_step_is_seen(case, backend, compiled):
    block = trained(Block(case, backend))
    run = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-5)
    x, target = case.x(), torch.zeros(6, 21)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (run(x) - target).square().sum()
        loss.backward()
        optimizer.step()
        wanted, _, _ = expected(block, x)
        with torch.no_grad():
            torch.testing.assert_close(run(x), wanted, rtol=1e-4, atol=1e-3)
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.995 * losses[0]
