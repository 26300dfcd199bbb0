"""The layers of a group at run time: changes that they must notice, copies, lifetimes and threads."""

import copy
import gc
import io
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from cospadi.backends import operator
from cospadi.errors import UsageError
from tests.backends.backend_cases import Block, Case, check_product

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# Changes that must be noticed


def replace_parameter(layer):
    layer.values = nn.Parameter(2 * layer.values.detach(), requires_grad=False)


def replace_twice(layer):
    """The first new tensor may leave its memory to the second."""
    for factor in (3, 2 / 3):
        layer.values = nn.Parameter(factor * layer.values.detach(), requires_grad=False)


def replace_data(layer):
    """Torch keeps no account of this, so it must be told."""
    layer.values.data = 2 * layer.values.data
    layer.forget()


def in_place(layer):
    layer.values.mul_(2)


def from_state(layer, assign=False):
    layer.load_state_dict({**layer.state_dict(), "values": 2 * layer.values}, assign=assign)


CHANGES = [replace_parameter, replace_twice, replace_data, in_place, from_state, lambda m: from_state(m, assign=True)]


@pytest.mark.parametrize(("backend", "mode"), [("torch", torch.no_grad), ("cpu", torch.inference_mode)])
@pytest.mark.parametrize("change", CHANGES)
def test_new_values_are_noticed(case, backend, change, mode):
    block, x = Block(case, backend), case.x()
    with mode():
        before = block(x)
        change(block.layers["m1"])
        after = block(x)
    torch.testing.assert_close(after[:, 7:12], 2 * before[:, 7:12])
    assert torch.equal(after[:, :7], before[:, :7])


def test_a_changed_input_is_not_taken_for_the_old_one(block, case):
    with torch.no_grad():
        x = case.x().clone()
        block.layers["m0"](x)
        x.mul_(2)
        check_product(x, *_of(case, 1), block.layers["m1"](x))


def test_layers_that_are_called_in_any_order_give_their_own_outputs(block, case, runs):
    x = case.x()
    with torch.no_grad():
        for order in ((2, 0, 1), (1, 1, 2), (0,), (2, 1, 0, 0)):
            for member in order:
                check_product(x, *_of(case, member), block.layers[f"m{member}"](x))
    assert len(runs) < 10


def _of(case, member):
    D, S = case.stored()
    return D, S.split(case.widths, dim=1)[member]


def test_substituted_tensors_are_used(block, case):
    x = case.x()
    with torch.no_grad():
        before = block(x)
        values = {"layers.m1.values": 2 * block.layers["m1"].values}
        after = torch.func.functional_call(block, values, (x,))
        assert torch.equal(after[:, 7:12], 2 * before[:, 7:12])
        assert torch.equal(after[:, :7], before[:, :7])
        assert torch.equal(block(x), before)


def test_inference_mode_shares_the_product_and_leaves_the_layer_usable(block, case, runs):
    with torch.inference_mode():
        inside = block(case.x())
    assert runs == [-1]
    with torch.no_grad():
        assert torch.equal(block(case.x()), inside)
    with torch.inference_mode():
        made_inside = Block(case)
    with torch.no_grad():
        assert torch.equal(made_inside(case.x()), inside)
    x = case.x().requires_grad_()
    block(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("shape", [(3, 10), (2, 3, 12), (0, 12), ()])
def test_inputs_of_another_width_are_refused(case, backend, shape):
    """Kernels would read beyond them."""
    block = Block(case, backend)
    for layer in block.layers.values():
        with torch.no_grad(), pytest.raises(UsageError, match="in_features=11"):
            layer(torch.zeros(shape))
    with pytest.raises(UsageError, match="in_features=11"):
        block(torch.zeros(shape, requires_grad=True))


@pytest.mark.parametrize("backend", ["cpu", "auto"])
def test_a_layer_is_used_in_two_dtypes_in_turn(case, backend):
    block = Block(case, backend)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
            x = case.x().to(dtype)
            check_product(x, *case.stored(), block(x))


def test_outputs_can_be_reshaped_as_those_of_a_linear_layer(block, case):
    """Attention does ``q(x).view(batch, length, heads, -1)``, and some models flatten."""
    x = case.x().view(2, 3, 11)
    with torch.no_grad():
        for layer, width in zip(block.layers.values(), (7, 5, 9), strict=True):
            y = layer(x)
            assert y.view(6, 1, width).shape == (6, 1, width)
            assert y.view(2, 3, width, 1).transpose(1, 2).shape == (2, width, 3, 1)


def test_an_output_that_is_changed_in_place_leaves_the_others_alone(block, case):
    x = case.x()
    with torch.no_grad():
        q = block.layers["m0"](x)
        q.fill_(7)
        check_product(x, *_of(case, 1), block.layers["m1"](x))
        k = block.layers["m2"](x)
        assert bool((q == 7).all())
        check_product(x, *_of(case, 2), k)


# Copies and lifetimes


def saved(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_independent(block, case, duplicate, runs):
    x = case.x()
    with torch.no_grad():
        before = block(x)
        block.layers["m0"](x)  # leaves outputs behind for the others
        other = duplicate(block)
        assert torch.equal(other(x), before)
        first, second = block.layers["m0"], other.layers["m0"]
        assert second._bundle is not first._bundle
        assert second._bundle._handle != first._bundle._handle
        assert second.owner is second
        assert other.layers["m1"].owner is second
        second.dictionary.zero_()
        assert not bool(other(x).any())
        assert torch.equal(block(x), before)
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        assert not bool(compiled(x).any())


def test_a_deleted_model_leaves_nothing_behind(case):
    gc.collect()
    before = len(operator._RUNNERS)
    block = Block(case)
    with torch.no_grad():
        block(case.x())
        block.layers["m0"](case.x())
    assert len(operator._RUNNERS) == before + 1
    replaced = weakref.ref(block.layers["m2"].values)
    watched = [weakref.ref(block.layers["m0"]._bundle), weakref.ref(block.layers["m1"].values)]
    with torch.no_grad():
        replace_parameter(block.layers["m2"])
        block(case.x())
    gc.collect()
    assert replaced() is None
    del block
    gc.collect()
    assert [reference() for reference in watched] == [None, None]
    assert len(operator._RUNNERS) == before


def test_outputs_are_not_kept_when_all_layers_have_theirs(block, case):
    with torch.no_grad():
        y = [layer(x) for x in [case.x()] for layer in block.layers.values()]
        watched = [weakref.ref(part) for part in y]
        del y
        assert [reference() for reference in watched] == [None] * 3
        x = case.x()
        block.layers["m0"](x)
        watched = weakref.ref(x)
        del x
        assert watched() is None


def test_moving_prepares_again(block, case):
    x, state = case.x(), Block(case).state_dict()
    with torch.no_grad():
        before = block(x)
        block.to("meta")
        assert block(x.to("meta")).device.type == "meta"
        block.to_empty(device="cpu")
        block.load_state_dict(state)
        assert torch.equal(block(x), before)


@pytest.mark.parametrize(("backend", "n_models"), [("torch", 1), ("cpu", 2)])
def test_models_run_in_several_threads(backend, n_models):
    cases = [Case(6, 19, 11, (7, 5, 9), seed=seed) for seed in range(2)]
    blocks = [Block(cases[index % n_models], backend) for index in range(n_models)]

    def work(index):
        block, case = blocks[index % n_models], cases[index % n_models]
        x = case.x() * 2 ** (index % 5)
        with torch.no_grad():
            check_product(x, *case.stored(), block(x))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(40)))
