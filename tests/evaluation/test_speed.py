"""What measuring speed rests on: sizes of layers, turns, and bytes; no test looks at time."""

import ctypes
import statistics
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cospadi.backends.base import BACKENDS, Placement
from cospadi.errors import UsageError
from cospadi.evaluation.speed import backend_memory as memory
from cospadi.evaluation.speed import contenders, machine
from cospadi.evaluation.speed.random_layers import layer_size, random_inputs, random_layer
from cospadi.evaluation.speed.timing import Rotation, median_ratio, spread, take_turns
from cospadi.formats.base import FORMATS

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize("value_dtype", ["bfloat16", "float32", "bfloat14", "int8"])
@pytest.mark.parametrize("shape", [(33, 70), (576, 192)], ids=str)
def test_a_layer_has_exactly_the_bytes_and_non_zeros_that_compression_would_store(shape, value_dtype):
    size = layer_size(shape, 0.3, value_dtype)
    layer = random_layer(size, BF16, CPU)
    coefficients = FORMATS.create("bitmask").unpack(layer.coefficients)
    assert coefficients.shape == (size.n_atoms, shape[1])
    assert set((coefficients != 0).sum(dim=0).tolist()) == {size.n_nonzero}
    nbytes = sum(tensor.nbytes for tensor in layer.stored)
    assert 0 <= nbytes - size.stored_bytes <= 1  # 14-bit values end within a byte
    assert nbytes <= 0.7 * 2 * shape[0] * shape[1]
    assert layer.weight.shape == (shape[1], shape[0])


def test_copies_are_equal_and_elsewhere():
    layer = random_layer(layer_size((40, 24), 0.3, "int8"), F32, CPU)
    copy = layer.copy()
    before = {tensor.data_ptr() for tensor in (*layer.stored, layer.weight)}
    for one, other in zip((*layer.stored, layer.weight), (*copy.stored, copy.weight), strict=True):
        assert torch.equal(one, other)
        assert other.data_ptr() not in before


def test_factors_depend_on_the_seed_alone():
    size = layer_size((40, 24), 0.3)
    one, same, other = (random_layer(size, F32, CPU, seed) for seed in (1, 1, 2))
    assert torch.equal(one.dictionary.values, same.dictionary.values)
    assert torch.equal(one.coefficients.tensors["mask"], same.coefficients.tensors["mask"])
    assert not torch.equal(one.coefficients.tensors["mask"], other.coefficients.tensors["mask"])
    assert torch.equal(random_inputs(3, 5, F32, CPU, 1), random_inputs(3, 5, F32, CPU, 1))


@pytest.mark.parametrize(("shape", "ratio"), [((4, 4), 0.9), ((0, 4), 0.3), ((64, 64), 0.0), ((64, 64), 1.0)], ids=str)
def test_layers_that_cannot_be_are_usage_errors(shape, ratio):
    with pytest.raises(UsageError):
        layer_size(shape, ratio)


def test_every_turn_goes_on_where_the_last_one_stopped(world):
    seen = []

    def call(index):
        seen.append(index)
        world.work(1.0)

    rotation = Rotation([partial(call, index) for index in range(5)])
    take_turns({"one": rotation}, world.clock, repeats=4, turn_seconds=2.5)
    # One call to warm up, one to see how long it takes, and turns of two.
    assert seen == [index % 5 for index in range(1 + 1 + 2 + 4 * 2)]


def test_a_turn_is_one_pass_over_the_copies_at_most_and_one_call_at_least(world):
    counts = {"fast": 0, "slow": 0, "free": 0}

    def call(name, seconds):
        counts[name] += 1
        world.work(seconds)

    rotations = {
        name: Rotation([partial(call, name, seconds)] * 10)
        for name, seconds in (("fast", 0.001), ("slow", 7.0), ("free", 0.0))
    }
    times = take_turns(rotations, world.clock, repeats=3, turn_seconds=0.1)
    assert counts == {"fast": 2 + 4 * 10, "slow": 2 + 4 * 1, "free": 2 + 4 * 1}
    assert times["fast"] == pytest.approx([0.001] * 3)
    assert times["slow"] == [7.0] * 3


def test_calls_of_a_graph_are_counted_one_by_one(world):
    times = take_turns({"graph": Rotation([partial(world.work, 6.0)], at_once=3)}, world.clock, repeats=2)
    assert times["graph"] == [2.0, 2.0]


def test_contenders_take_turns_and_another_one_begins_every_time(world):
    order = []
    names = ("a", "b", "c")
    rotations = {name: Rotation([partial(order.append, name)]) for name in names}
    take_turns(rotations, lambda work: (work(), 1.0)[1], repeats=4)
    assert "".join(order[-12:]) == "abcbcacababc"


def test_noise_that_slows_a_whole_repeat_leaves_the_ratio(world):
    slow = [1.0, 50.0, 1.0, 3.0, 9.0]
    assert median_ratio([2.0 * s for s in slow], [0.5 * s for s in slow]) == 4.0
    with pytest.raises(ValueError, match="shorter"):
        median_ratio([1.0, 2.0], [1.0])


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_the_spread_is_that_of_the_values(values):
    found = spread(values)
    assert found.median == pytest.approx(statistics.median(values))
    assert min(values) <= found.low * (1 + 1e-9)
    assert found.low <= found.median * (1 + 1e-9)
    assert found.median <= found.high * (1 + 1e-9)
    assert found.high <= max(values) * (1 + 1e-9)


def test_quartiles_lie_between_the_values():
    assert spread([1, 2, 3, 4, 5]) == spread([5, 3, 1, 4, 2])
    assert (spread([1, 2, 3, 4, 5]).low, spread([1, 2, 3, 4, 5]).high) == (2, 4)


@dataclass
class Inner:
    tensors: list
    note: str = "text"


Pair = namedtuple("Pair", "left right")


def test_only_memory_besides_the_stored_tensors_is_counted():
    stored = torch.zeros(100, dtype=torch.uint8)
    kept = torch.zeros(40, dtype=torch.float32)
    structure = (ctypes.c_int64 * 3)()
    state = Pair(Inner([stored, stored[10:20], kept, kept[:3]]), {"again": kept, "struct": structure, "none": None})
    assert memory.extra_bytes(state, [stored]) == 160 + 24
    assert memory.extra_bytes(state, []) == 100 + 160 + 24
    assert memory.extra_bytes((stored, 5, "text", None, torch.device("cpu")), [stored]) == 0


def test_a_view_keeps_its_whole_memory():
    assert memory.extra_bytes([torch.zeros(1000)[:2]], []) == 4000


def test_a_state_that_holds_itself_is_walked_once():
    state = [torch.zeros(8)]
    state.append(state)
    assert memory.extra_bytes(state, []) == 32


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
def test_compressed_rows_of_torch_and_scipy_are_counted():
    from scipy.sparse import csr_matrix

    dense = torch.eye(6)
    indices = torch.arange(7, dtype=torch.int32)
    sparse = torch.sparse_csr_tensor(indices, indices[:6].clone(), torch.ones(6), (6, 6), check_invariants=True)
    assert memory.extra_bytes(sparse, []) == 7 * 4 + 6 * 4 + 6 * 4
    found = csr_matrix(dense.numpy())
    assert memory.extra_bytes([found], []) == found.data.nbytes + found.indices.nbytes + found.indptr.nbytes


@pytest.mark.parametrize("name", ["reference", "torch"])
def test_dense_backends_keep_s_with_its_zeros_besides(name):
    size = layer_size((64, 48), 0.3)
    layer, backend = random_layer(size, BF16, CPU), BACKENDS.create(name)
    state = contenders.prepare(backend, layer, Placement(CPU, BF16))
    assert memory.extra_bytes(state, layer.stored) == size.n_atoms * 48 * 2
    state = contenders.prepare(backend, layer, Placement(CPU, F32))
    assert memory.extra_bytes(state, layer.stored) == size.n_atoms * (48 + 64) * 4


def test_scratch_is_what_lives_at_once_besides_the_result():
    x = torch.ones(1000)

    def one_after_the_other():
        for _ in range(5):
            result = x * 2  # the one before is dropped when its successor exists
        return result

    def side_by_side():
        return torch.stack([x * 2, x * 3, x * 4]).sum(dim=0)

    def views():
        y = x.clone()
        return y[:500].view(5, 100).T

    assert memory.scratch_bytes(lambda: x * 2, CPU) == 0
    assert memory.scratch_bytes(lambda: x.view(10, 100), CPU) == 0
    assert memory.scratch_bytes(one_after_the_other, CPU) == 4000
    # Six at the worst moment, five more than the one that is the result.
    assert memory.scratch_bytes(side_by_side, CPU) == 5 * 4000
    assert memory.scratch_bytes(views, CPU) == 0
    assert memory.scratch_bytes(lambda: x.add_(0), CPU) == 0


def test_scratch_of_two_products_is_what_stands_between_them():
    size = layer_size((64, 48), 0.3)
    layer, backend = random_layer(size, BF16, CPU), BACKENDS.create("reference")
    state, x = contenders.prepare(backend, layer, Placement(CPU, BF16)), random_inputs(5, 64, BF16, CPU)
    assert memory.scratch_bytes(lambda: backend.multiply(*state, x, None), CPU) == 5 * size.n_atoms * 2


def test_copies_fill_twice_the_cache_within_limits():
    cuda = torch.device("cuda")
    mega = 1 << 20
    assert contenders.n_copies(mega, 2 * mega, 50 * mega, cuda) == 101  # more than twice, not just twice
    assert contenders.n_copies(mega, 2 * mega, 20 * mega, CPU) == 96
    assert contenders.n_copies(mega, 2 * mega, 64 * mega, CPU) == 129
    assert contenders.n_copies(1000, 2000, 64 * mega, CPU) == 200
    assert contenders.n_copies(200 * mega, 600 * mega, 512 * mega, CPU) == 2
    assert contenders.n_copies(mega, 30 * mega, 64 * mega, CPU) == 1536 // 30


def test_the_cache_is_what_the_system_says(tmp_path):
    for index, text in enumerate(("32K", "1M", "512K", "junk")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text + "\n")
    (tmp_path / "index9").mkdir()
    assert machine._processor_cache(tmp_path) == 1 << 20
    assert machine._processor_cache(tmp_path / "absent") == 32 << 20


def test_rates_are_bytes_and_operations_by_the_best_time():
    times = iter([4.0, 2.0, 8.0])
    assert machine.bandwidth(CPU, 4000, 3, clock=lambda work: next(times)) == 2000.0
    times = iter([4.0, 0.5])
    assert machine.product_rate(CPU, F32, 8, 2, clock=lambda work: next(times)) == 2 * 8**3 / 0.5
