"""The kernels of the CUDA backend, run by an emulator on the CPU through the backend's own code."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cospadi.backends.base import Placement
from cospadi.backends.bitmap import bitmap_of
from cospadi.backends.cuda import launches
from cospadi.backends.cuda import runtime as cuda
from cospadi.backends.cuda.layout import SLAB_ATOMS, TILE, Rows, Slabs, rows_of, slabs_of
from cospadi.formats.base import FORMATS, PackedDictionary
from tests.backends import backend_cases
from tests.backends.emulator.emulated import COMPILER, ORDERS, EmulatedModule, Fault, build

CPU = torch.device("cpu")
BF16, F16 = torch.bfloat16, torch.float16
TYPES = (BF16, F16)

# Of the norm of y.  The result is rounded once (2^-9 and 2^-12 of every entry at most) and z, rounded by kernel and
# reference alike, may now and then fall to the other side of a tie, because it is summed in another precision.
TOLERANCE = {BF16: 5e-3, F16: 1e-3}

KERNELS = {
    f"{kind}_{name}_{rest}"
    for name in ("bf16", "f16")
    for kind, variants in {
        "project": ("16_8", "16_16", "8_8", "8_16"),
        "combine": ("16_8", "16_16", "16_32", "16_64", "8_8", "8_16", "8_32", "8_64"),
        "densify": ("16", "8"),
    }.items()
    for rest in variants
} | {"finish_bf16", "finish_f16"}


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed: the emulator of the CUDA kernels needs g++ or clang++")
    return build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def library(built):
    return built[0]


@pytest.fixture
def program(built):
    return built[1]


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Let torch fill what it does not initialise: entries of y, z or partial sums that a kernel leaves out are seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case(backend_cases.Case):
    """A group of layers in 16 bits, or with 8-bit values, and how the backend runs it."""

    dtype: torch.dtype = BF16
    value_dtype: str = "bfloat16"
    member: int | None = None
    n_processors: int = 1
    options: dict = field(default_factory=dict)
    alone: bool = False  # the coefficients without the dictionary

    def run(self, path, order="forward", seed=0, x=None):
        """Give y, and the names and arguments of the kernels that were launched."""
        module = EmulatedModule(path, order, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "machine_of", lambda device: cuda.Machine(module, self.n_processors, None))
            backend, placement = cuda.CudaBackend(**self.options), Placement(CPU, self.dtype)
            dictionary = None if self.alone else backend.prepare_dictionary(self.dictionary(), placement)
            coefficients = backend.prepare_coefficients(self.members(), placement)
            y = backend.multiply(dictionary, coefficients, self.x() if x is None else x, self.member)
        assert (y.dtype, y.is_contiguous()) == (self.dtype, True)
        return y, module.launched

    def reference(self):
        """Give z and S in float64, z rounded as between the kernels, what large products expand rounded as there."""
        backend = cuda.CudaBackend(**self.options)
        D, S = self.stored()
        S = S if self.member is None else S.split(self.widths, dim=1)[self.member]
        D = D.to(self.dtype).double() if self.n_tokens > backend.project_tokens else D
        S = S.to(self.dtype).double() if self.n_tokens > backend.combine_tokens else S
        return (self.x().double() @ D).to(self.dtype).double(), S

    def check(self, path, **order):
        y, launched = self.run(path, **order)
        z, S = self.reference()
        expected = z @ S
        assert y.shape == expected.shape
        assert float((y.double() - expected).norm()) <= TOLERANCE[self.dtype] * float(expected.norm())
        return [name for name, _ in launched]


PREFILL = {"combine_tokens": 4, "project_tokens": 4}
VALUES = pytest.mark.parametrize(
    ("dtype", "value_dtype"), [(BF16, "bfloat16"), (BF16, "int8"), (F16, "float16"), (F16, "int8")], ids=str
)
CORNERS = pytest.mark.parametrize(("dtype", "value_dtype"), [(BF16, "int8"), (F16, "float16")], ids=str)
SHAPES = {
    "odd": {},
    "whole": {"n_atoms": 128, "in_features": 64, "widths": (32,), "density": 1.0},
    "one": {"n_atoms": 1, "in_features": 1, "widths": (1, 1)},
    "several slabs": {"n_atoms": 321, "in_features": 200, "widths": (17, 16, 15)},
    "empty": {"density": 0.0},
    "ragged": {"density": None, "n_atoms": 150},
}


@VALUES
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right(library, shape, value_dtype, dtype):
    case = Case(**SHAPES[shape], dtype=dtype, value_dtype=value_dtype)
    for n_tokens in (1, 8, 9, 17, 64):
        replace(case, n_tokens=n_tokens).check(library)
    replace(case, n_tokens=9, options=PREFILL).check(library)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_tokens=st.integers(0, 70),
    n_atoms=st.integers(1, 200),
    in_features=st.integers(1, 200),
    widths=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    density=st.sampled_from([None, 0.0, 0.02, 0.5, 0.95, 1.0]),
    values=st.sampled_from([(BF16, "bfloat16"), (BF16, "int8"), (F16, "float16"), (F16, "int8")]),
    which=st.integers(-1, 2),
    n_processors=st.sampled_from([1, 8, 132]),
    options=st.sampled_from([{}, PREFILL, {"project_tokens": 0}, {"combine_tokens": 0}]),
    order=st.sampled_from(ORDERS),
    seed=st.integers(0, 99),
)
def test_products_are_right_for_any_shape(library, values, widths, which, order, seed, **sizes):
    member = which if 0 <= which < len(widths) else None
    dtype, value_dtype = values
    case = Case(**sizes, dtype=dtype, value_dtype=value_dtype, widths=tuple(widths), member=member, seed=seed)
    y, _ = case.run(library, order, seed)
    z, S = case.reference()
    assert y.shape == (case.n_tokens, S.shape[1])
    # Small products may cancel: the error is compared with what is added up.
    assert float((y.double() - z @ S).norm()) <= TOLERANCE[case.dtype] * float((z.abs() @ S.abs()).norm())


STORED = [("bitmask", v, d) for v in ("bfloat16", "int8", "int4") for d in ("bfloat16", "int8", "int4g32")]
STORED += [("identity", "none", d) for d in ("bfloat16", "float32", "int8", "int6g64", "int2g32")]


@pytest.mark.parametrize(("format", "value_dtype", "dictionary_dtype"), STORED)
def test_every_pair_of_dtypes_and_layers_that_are_only_quantised_run(library, format, value_dtype, dictionary_dtype):
    fields = {"format": format, "value_dtype": value_dtype, "dictionary_dtype": dictionary_dtype, "n_processors": 4}
    for n_atoms, dtype in ((1, BF16), (75, F16), (75, BF16), (128, F16)):
        widths = (n_atoms,) if format == "identity" else (37, 5)
        for n_tokens, options in ((0, {}), (1, {}), (17, {}), (9, PREFILL)):
            case = Case(n_tokens, n_atoms, 45, widths, dtype=dtype, options=options, **fields)
            y, launched = case.run(library)
            backend_cases.check(case, y)
            if format == "identity":
                assert {name.split("_")[0] for name, _ in launched} <= {"project", "finish"}


@CORNERS
def test_coefficients_run_alone(library, program, value_dtype, dtype):
    """As where the dictionary is on the side of the outputs; 64 and 128 are whole slabs, whose rows are not copied."""
    for n_atoms, widths in ((1, (1,)), (64, (37,)), (75, (37, 5)), (321, (70,))):
        for n_tokens, options in ((0, {}), (1, {}), (33, {}), (9, PREFILL)):
            fields = {"value_dtype": value_dtype, "n_processors": 4, "options": options, "alone": True}
            case = Case(n_tokens, n_atoms, n_atoms, widths, None, dtype, **fields)
            x = torch.empty(n_tokens * n_atoms + 1, dtype=dtype)[1:].view(n_tokens, n_atoms).copy_(case.x())
            for path, member in ((library, None), (program, len(widths) - 1)):
                y, launched = replace(case, member=member).run(path, x=x)
                S = case.stored()[1] if member is None else case.stored()[1].split(widths, dim=1)[member]
                backend_cases.check_product(x, torch.eye(n_atoms, dtype=torch.float64), S, y)
                assert {name.split("_")[0] for name, _ in launched} <= {"combine", "densify", "finish"}


FEW_ATOMS = {"n_atoms": 20, "in_features": 4200, "widths": (9,)}
FEW_COLUMNS = {"n_atoms": 4100, "in_features": 9, "widths": (20, 9)}
ORDERED = [
    *(Case(n, n_atoms=300, in_features=600, n_processors=p) for n in (3, 20) for p in (1, 132)),
    *(Case(n, n_atoms=300, value_dtype="int8") for n in (3, 16, 64)),
    *(Case(n, n_processors=132, **shape) for n, shape in ((3, FEW_ATOMS), (9, FEW_COLUMNS))),  # sums are split
    # Some slabs more than a warp has stages for.
    Case(n_atoms=1300),
    Case(n_atoms=1300, n_tokens=16, value_dtype="int8"),
    Case(n_tokens=5, options=PREFILL),
]


@pytest.mark.parametrize("case", ORDERED, ids=str)
def test_the_order_of_threads_and_copies_does_not_change_a_bit(library, case):
    expected, _ = case.run(library)
    for order, seed in (("reverse", 0), ("random", 1), ("random", 2)):
        assert torch.equal(case.run(library, order, seed)[0], expected)


@VALUES
@pytest.mark.parametrize("shape", [FEW_ATOMS, FEW_COLUMNS], ids=["D", "S"])
def test_sums_over_several_blocks_are_right(library, shape, value_dtype, dtype):
    whole, split = Case(**shape, dtype=dtype, value_dtype=value_dtype), f"finish_{'bf16' if dtype == BF16 else 'f16'}"
    assert split not in whole.check(library)
    assert split in replace(whole, n_processors=132).check(library)
    assert split in replace(whole, n_processors=132, member=0).check(library, order="reverse")


def sanitized_cases():
    for dtype, name in ((BF16, "bfloat16"), (F16, "float16")):
        for value_dtype in (name, "int8"):
            case = Case(dtype=dtype, value_dtype=value_dtype)
            yield from (replace(case, n_tokens=n) for n in (1, 9, 17, 33))
            yield replace(case, n_tokens=2, **FEW_ATOMS, n_processors=132)
            yield replace(case, options=PREFILL, n_tokens=9, member=1)
            yield replace(case, density=1.0, widths=(16,), n_tokens=8)
            yield replace(case, density=0.0, n_atoms=1, in_features=1, widths=(1, 1), member=1, n_tokens=1)


@pytest.mark.slow
def test_no_kernel_reads_or_writes_out_of_bounds(program):
    launched = set()
    for case in sanitized_cases():
        launched.update(case.check(program, order="random"))
    assert launched == KERNELS


FAULTS = {
    "copies_from_odd_address": "not a multiple of 16",
    "reads_beyond_the_end": "heap-buffer-overflow",
    "reads_beyond_shared": "heap-buffer-overflow",
    "leaves_before_barrier": "barrier divergence",
    "half_a_warp_at_a_barrier": "barrier divergence",
    "shuffles_in_a_branch": "lanes of a warp wait in",
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_emulator_finds_faults(program, name):
    arrays = 2 if name in ("copies_from_odd_address", "reads_beyond_the_end") else 1
    args = tuple(torch.zeros(64, dtype=torch.int32) for _ in range(arrays))
    with pytest.raises(Fault, match=FAULTS[name]):
        EmulatedModule(program).kernel(name).launch((1, 1, 1), (64, 1, 1), 256, args)


def test_the_emulator_finds_races(library):
    def result(name, order, *arrays):
        out = torch.zeros(64, dtype=torch.int32)
        EmulatedModule(library, order).kernel(name).launch((1, 1, 1), (64, 1, 1), 1024, (*arrays, out))
        return out

    expected = (torch.arange(64) + 32).to(torch.int32) % 64
    for order in ORDERS:
        assert torch.equal(result("reads_with_barrier", order), expected)
        assert not torch.equal(result("reads_without_barrier", order), expected)
    # Copies that nobody waited for are not there: shared memory is as it was filled.
    assert bool((result("reads_copy_too_early", "forward", torch.zeros(256, dtype=torch.int32)) == -1).all())


@pytest.mark.parametrize("eight_bit", [False, True])
def test_slabs_hold_every_entry_where_the_docstring_says(eight_bit):
    case = Case(n_atoms=150, density=None, value_dtype="int8" if eight_bit else "bfloat16")
    bitmap = bitmap_of(case.members(), CPU)
    slabs = slabs_of(bitmap, BF16)
    values = slabs.values.view(torch.int8 if eight_bit else BF16).double()
    found = torch.zeros(bitmap.out_features, bitmap.n_atoms, dtype=torch.double)
    words = slabs.masks.numpy().view("uint32")
    columns = slabs.columns.tolist()
    for tile, slab in ((t, s) for t in range(words.shape[0]) for s in range(words.shape[1])):
        place = int(slabs.offsets[tile * words.shape[1] + slab]) * 16 // slabs.value_bytes
        for bit in range(TILE * SLAB_ATOMS):
            if words[tile, slab, bit // 32] >> (bit % 32) & 1:
                j, lane, half, i = bit % 4, bit // 4 % 32, bit // 128 % 2, bit // 256
                column, atom = 8 * half + lane // 4, 16 * (lane % 4) + 4 * i + j
                assert columns[tile] + column < columns[tile + 1]
                found[columns[tile] + column, slab * SLAB_ATOMS + atom] = values[place]
                place += 1
    assert slabs.tiles_of(None) == (0, 4)
    assert slabs.tiles_of(1) == (3, 4)
    if slabs.scales is not None:
        found *= slabs.scales.double().unsqueeze(1)
    S = torch.cat([FORMATS.create("bitmask").unpack(packed) for packed in case.members()], dim=1)
    assert torch.equal(found.to(S.dtype), S.T)


def test_large_layers_are_repacked_in_parts(monkeypatch):
    bitmap = bitmap_of(Case(widths=(100, 40)).members(), CPU)
    whole = slabs_of(bitmap, BF16)
    monkeypatch.setattr("cospadi.backends.cuda.layout._CHUNK", 1)
    parts = slabs_of(bitmap, BF16)
    for name in ("masks", "values", "offsets", "columns"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_what_is_aligned_is_not_copied_and_the_rest_is(library):
    values = torch.randn(5, 48).to(torch.int8)
    assert rows_of(PackedDictionary(values, torch.ones(5)), CPU, BF16).values.data_ptr() == values.data_ptr()
    assert rows_of(PackedDictionary(values[:, :47], torch.ones(5)), CPU, BF16).row_length == 48
    case = Case(in_features=48)
    x = torch.empty(3 * 48 + 1, dtype=BF16)[1:].view(3, 48).copy_(case.x())
    assert x.data_ptr() % 16
    y, launched = case.run(library, x=x)
    assert launched[0][1][2].data_ptr() % 16 == 0
    assert torch.equal(y, case.run(library)[0])


@settings(max_examples=100, deadline=None)
@given(
    n_tokens=st.integers(1, 300),
    width=st.integers(1, 30000),
    n_atoms=st.integers(1, 9000),
    value_bytes=st.sampled_from([1, 2]),
    n_processors=st.sampled_from([1, 16, 58, 108, 132, 170]),
)
def test_launches_keep_to_the_limits_of_every_gpu(n_tokens, width, n_atoms, value_bytes, n_processors):
    n_slabs, n_tiles = -(-n_atoms // SLAB_ATOMS), -(-width // TILE)
    meta = {"device": "meta"}
    slabs = Slabs(
        n_atoms=n_atoms,
        ends=(width,),
        tile_ends=(n_tiles,),
        masks=torch.empty(n_tiles, n_slabs, 32, dtype=torch.int32, **meta),
        values=torch.empty(0, dtype=torch.uint8, **meta),
        value_bytes=value_bytes,
        offsets=torch.empty(0, dtype=torch.int32, **meta),
        columns=torch.empty(0, dtype=torch.int32, **meta),
        scales=None,
        largest=TILE * SLAB_ATOMS * value_bytes,  # all stored: the most that shared memory must hold
    )
    rows = Rows(torch.empty(n_atoms, 4096, dtype=BF16, **meta), None, 4096)
    x = torch.empty(n_tokens, 4096, dtype=BF16, **meta)
    z = torch.empty(n_tokens, slabs.padded_atoms, dtype=BF16, **meta)
    y = torch.empty(n_tokens, width, dtype=BF16, **meta)
    dense = torch.empty(width, slabs.padded_atoms, dtype=BF16, **meta)
    planned = [
        *launches.project(rows, x, z, n_processors),
        *launches.combine(slabs, z, y, None, n_processors),
        *launches.densify(slabs, dense, None),
    ]
    for launch in planned:
        threads = launch.block[0]
        many = launch.kernel.endswith(("_8_8", "_8_16", "_16_8", "_16_16")) and not launch.kernel.startswith("densify")
        assert threads % 32 == 0
        assert 32 <= threads <= (512 if many else 256)
        assert launch.block[1:] == (1, 1)
        assert launch.shared_bytes <= launches.SHARED_LIMIT
        assert min(launch.grid) >= 1
        assert max(launch.grid[1:]) <= 65535
        if launch.shared_bytes > 48 * 1024:
            assert launch.kernel in set(launches.kernels_with_much_shared_memory())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_longer_dtypes_take_two_dense_products(dtype):
    case = Case(dtype=dtype, value_dtype="float32")
    backend, placement = cuda.CudaBackend(), Placement(CPU, dtype)
    members = [FORMATS.create("bitmask").pack(torch.eye(case.n_atoms, 7), "float32")] * 2
    dictionary = backend.prepare_dictionary(case.dictionary(), placement)
    coefficients = backend.prepare_coefficients(members, placement)
    expected = case.x() @ case.dictionary().values[:7].T.to(dtype)
    for member, columns in ((None, 2), (1, 1)):
        y = backend.multiply(dictionary, coefficients, case.x(), member)
        torch.testing.assert_close(y, expected.repeat(1, columns))
        z = torch.randn(3, case.n_atoms).to(dtype)
        torch.testing.assert_close(backend.multiply(None, coefficients, z, member), z[:, :7].repeat(1, columns))


def test_old_gpus_and_other_devices_are_refused_with_a_reason(monkeypatch):
    packed, backend = Case().members()[0], cuda.CudaBackend()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    state = backend.supports(packed, Placement(torch.device("cuda:0"), BF16))
    assert not state
    assert "7.5" in state.reason
    assert "8.0" in state.reason
    assert "cpu" in backend.supports(packed, Placement(CPU, BF16)).reason
    assert "int8" in backend.supports(packed, Placement(torch.device("cuda:0"), torch.int8)).reason
