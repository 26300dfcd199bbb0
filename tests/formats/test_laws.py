"""What every storage format must obey, for every value dtype it offers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError, NumericalError, UsageError
from cospadi.formats.base import FORMATS, PackedCoefficients
from cospadi.formats.bitmask import count_bits, pack_bits, unpack_bits
from cospadi.formats.dictionary import DICTIONARY_DTYPES, dictionary_dtype_of, dictionary_layout
from cospadi.formats.factorization import GroupSpec, SparseFactorization
from cospadi.formats.packing import group_bits, pack_group, unpack_group
from cospadi.formats.quantization import dequantize, grid_of, representable_scales, scale_shape
from cospadi.formats.values import HOLDING_DTYPES

from .references import nearest_whole

CASES = [(f, v) for f in ("bitmask", "csr", "dense") for v in FORMATS.create(f).value_dtypes]
STORED_DICTIONARIES = [d for d in DICTIONARY_DTYPES if d != "none"]
UNPACKED_DTYPES = HOLDING_DTYPES | dict.fromkeys(("int8", "int6", "int4"), torch.float32)
PROFILE = settings(max_examples=25, deadline=None)


@st.composite
def coefficients(draw):
    """S with any number of non-zeros per column: none, all, ragged; magnitudes over many orders."""
    n_atoms, out_features = draw(st.integers(1, 37)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    matrix = torch.randn(n_atoms, out_features, generator=generator)
    matrix *= 10.0 ** torch.randint(-8, 4, matrix.shape, generator=generator)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    matrix[torch.rand(matrix.shape, generator=generator) >= density] = 0
    if draw(st.booleans()):
        matrix[:, draw(st.integers(0, out_features - 1))] = 0
    return matrix


def nearest_even(matrix, value_dtype):
    """Round one by one: of the two neighbours in the dtype the nearer, of two equally near the even one."""
    grid = grid_of(value_dtype)
    if grid is not None:
        return nearest_whole(matrix.T, grid.bits)[2].T
    if value_dtype != "bfloat14":
        return matrix.to(HOLDING_DTYPES[value_dtype])
    rounded = []
    for value in matrix.reshape(-1).tolist():
        code = int(torch.tensor(value).view(torch.int32)) & 0xFFFFFFFF
        candidates = [code >> 18 << 18, ((code >> 18) + 1) << 18]
        numbers = [
            float(torch.tensor(c - (1 << 32) if c >> 31 else c, dtype=torch.int32).view(torch.float32))
            for c in candidates
        ]
        rounded.append(min(zip(numbers, candidates, strict=True), key=lambda p: (abs(p[0] - value), p[1] >> 18 & 1))[0])
    return torch.tensor(rounded).reshape(matrix.shape).to(torch.bfloat16)


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
@given(matrix=coefficients())
@PROFILE
def test_unpack_of_pack_is_the_rounded_matrix(name, value_dtype, matrix):
    before = matrix.clone()
    codec = FORMATS.create(name)
    packed = codec.pack(matrix, value_dtype)
    codec.check(packed)
    assert torch.equal(matrix, before)
    unpacked = codec.unpack(packed)
    assert unpacked.dtype == UNPACKED_DTYPES[value_dtype]
    assert torch.equal(unpacked, nearest_even(matrix, value_dtype))


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
@given(matrix=coefficients())
@PROFILE
def test_packing_again_gives_the_same_tensors_of_the_promised_layout(name, value_dtype, matrix):
    codec = FORMATS.create(name)
    packed = codec.pack(matrix, value_dtype)
    again = codec.pack(codec.unpack(packed), value_dtype)
    n_stored = int((codec.unpack(packed) != 0).sum()) if name != "dense" else matrix.numel()
    assert codec.n_stored(packed) == n_stored
    layout = codec.layout(*matrix.shape, n_stored, value_dtype)
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.tensors.items()} == layout
    for key, tensor in packed.tensors.items():
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), again.tensors[key].reshape(-1).view(torch.uint8))
    bits = codec.bits(*matrix.shape, n_stored, value_dtype)
    stored = 8 * sum(t.nbytes for t in packed.tensors.values())
    assert 0 <= stored - bits < 8 * len(packed.tensors)


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
@given(matrix=coefficients(), seed=st.integers(0, 2**31))
@PROFILE
def test_gather_takes_what_unpack_puts(name, value_dtype, matrix, seed):
    """Every place that is stored is taken once, in the order of the values; other entries do not matter."""
    codec = FORMATS.create(name)
    packed = codec.pack(matrix, value_dtype)
    unpacked = codec.unpack(packed)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(matrix.shape, generator=generator)
    stored = torch.ones(matrix.shape, dtype=torch.bool) if name == "dense" else unpacked != 0
    gathered = codec.gather(packed, torch.where(stored, other, torch.nan))
    columns = [column[kept] for column, kept in zip(other.T, stored.T, strict=True)]
    assert torch.equal(gathered.reshape(-1), torch.cat(columns))
    if value_dtype == "int8":
        scales = codec.gather(packed, packed.tensors["scales"].expand(matrix.shape))
        assert torch.equal(codec.gather(packed, unpacked), packed.tensors["values"] * scales)
    elif value_dtype not in ("bfloat14", "int6", "int4"):
        assert torch.equal(codec.gather(packed, unpacked), packed.tensors["values"])


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
def test_an_absurd_layout_takes_no_memory(name, value_dtype):
    layout = FORMATS.create(name).layout(2**20, 2**30, 2**40, value_dtype)
    tensors = {k: torch.empty(shape, dtype=dtype, device="meta") for k, (shape, dtype) in layout.items()}
    assert sum(t.numel() for t in tensors.values()) > 2**40


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
def test_count_stored_is_what_is_stored(name, value_dtype):
    matrix = torch.zeros(40, 6)
    matrix[:7] = 1
    packed = FORMATS.create(name).pack(matrix, value_dtype)
    count = FORMATS.create(name).count_stored(40, 6, 7)
    assert packed.tensors["values"].shape == FORMATS.create(name).layout(40, 6, count, value_dtype)["values"][0]


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(name, value_dtype, bad):
    with pytest.raises(NumericalError, match="NaN or infinity"):
        FORMATS.create(name).pack(torch.tensor([[1.0, bad]]), value_dtype)


@pytest.mark.parametrize(("value_dtype", "large"), [("float16", 7e4), ("bfloat16", 3.4e38), ("bfloat14", 3.38e38)])
def test_overflow_is_refused_not_stored(value_dtype, large):
    for sign in (1, -1):
        with pytest.raises(NumericalError, match="overflows"):
            FORMATS.create("bitmask").pack(torch.tensor([[sign * large]]), value_dtype)


@pytest.mark.parametrize("sign", [1, -1])
def test_fourteen_bits_round_ties_to_even_and_keep_tiny_numbers(sign):
    step = 2.0**-5
    given = [1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, 1 + 0.49 * step, 2 - step / 2, 2.0**-131, 2.0**-132]
    stored = [1, 1 + 2 * step, 1 + step, 1, 2, 2.0**-131, 0]
    codec = FORMATS.create("dense")
    unpacked = codec.unpack(codec.pack(sign * torch.tensor([given]), "bfloat14"))
    assert (sign * unpacked[0]).tolist() == stored


def test_an_entry_that_rounds_to_zero_is_not_stored():
    packed = FORMATS.create("bitmask").pack(torch.tensor([[1e-9], [1.0]]), "float16")
    assert packed.tensors["values"].tolist() == [1.0]
    assert packed.tensors["mask"].tolist() == [[2]]


def test_an_entry_that_is_no_multiple_of_its_scale_is_not_stored():
    for name in ("bitmask", "csr"):
        packed = FORMATS.create(name).pack(torch.tensor([[127.0], [0.5], [-0.5], [0.51]]), "int8")
        assert packed.tensors["values"].tolist() == [127, 1]
        assert packed.tensors["scales"].tolist() == [1.0]


def test_csr_says_that_it_stores_no_14_bit_values():
    with pytest.raises(UsageError, match="'csr' does not store 'bfloat14'"):
        FORMATS.create("csr").pack(torch.ones(2, 2), "bfloat14")


def test_csr_chooses_the_index_by_the_number_of_atoms():
    layouts = [FORMATS.create("csr").layout(n, 3, 5, "float32")["columns"][1] for n in (32767, 32768)]
    assert layouts == [torch.int16, torch.int32]
    matrix = torch.zeros(40000, 1)
    matrix[[0, 39999]] = 1
    codec = FORMATS.create("csr")
    assert torch.equal(codec.unpack(codec.pack(matrix, "float32")), matrix)


@given(rows=st.integers(0, 5), n=st.integers(1, 70), seed=st.integers(0, 2**31))
@PROFILE
def test_bits_survive_packing_and_are_counted(rows, n, seed):
    support = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = pack_bits(support)
    assert torch.equal(unpack_bits(mask, n), support)
    assert torch.equal(count_bits(mask), support.sum(dim=1))
    assert torch.equal(count_bits(torch.full((1, 3), 255, dtype=torch.uint8)), torch.tensor([24]))


GOLDEN = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.5, 3.0]])


@pytest.mark.parametrize(
    ("name", "value_dtype", "expected"),
    [
        ("bitmask", "bfloat16", {"values": "803f003f00c04040", "mask": "0506"}),
        ("bitmask", "bfloat14", {"values": "e00ff003004340", "mask": "0506"}),
        (
            "csr",
            "float16",
            {"values": "003c003800c00042", "columns": "0000020001000200", "row_pointers": "000000000200000004000000"},
        ),
        ("dense", "float16", {"values": "003c00000038000000c00042"}),
        ("bitmask", "int8", {"values": "7f40ab7f", "mask": "0506", "scales": "0002013c0083c13c"}),
        (
            "csr",
            "int8",
            {
                "values": "7f40ab7f",
                "columns": "0000020001000200",
                "row_pointers": "000000000200000004000000",
                "scales": "0002013c0083c13c",
            },
        ),
        ("dense", "int8", {"values": "7f004000ab7f", "scales": "0002013c0083c13c"}),
        ("bitmask", "int6", {"values": "005403", "mask": "0506", "scales": "000000bd0000c0bd"}),
        ("bitmask", "int4", {"values": "400d", "mask": "0506", "scales": "000000be0000c0be"}),
        ("dense", "int4", {"values": "80840d", "scales": "000000be0000c0be"}),
    ],
)
def test_the_bytes_are_those_of_the_documentation(name, value_dtype, expected):
    packed = FORMATS.create(name).pack(GOLDEN, value_dtype)
    assert {k: t.view(torch.uint8).numpy().tobytes().hex() for k, t in packed.tensors.items()} == expected


DAMAGE = {
    "a mask that counts more than the values": ("bitmask", "bfloat16", "mask", lambda t: t | 1),
    "a mask that counts more 14-bit values": ("bitmask", "bfloat14", "mask", lambda t: t | 1),
    "padding bits of the mask": (
        "bitmask",
        "bfloat16",
        "mask",
        lambda t: torch.tensor([[0x84], [0x06]], dtype=t.dtype),
    ),
    "padding bits of 14-bit values": ("dense", "bfloat14", "values", lambda t: torch.cat([t[:-1], t[-1:] | 0x80])),
    "a 14-bit infinity": ("bitmask", "bfloat14", "values", lambda t: torch.full_like(t, 0xFF)),
    "a mask of another shape": ("bitmask", "bfloat16", "mask", lambda t: t[:1]),
    "values of another dtype": ("bitmask", "bfloat16", "values", lambda t: t.float()),
    "values too few": ("csr", "bfloat16", "values", lambda t: t[1:]),
    "an atom out of range": ("csr", "bfloat16", "columns", lambda t: t + 1),
    "a negative atom": ("csr", "bfloat16", "columns", lambda t: t - 1),
    "atoms that descend": ("csr", "bfloat16", "columns", lambda t: t[[1, 0, 2, 3]]),
    "an atom twice": ("csr", "bfloat16", "columns", lambda t: t[[0, 0, 2, 3]]),
    "pointers that descend": ("csr", "bfloat16", "row_pointers", lambda t: t * torch.tensor([1, 3, 1], dtype=t.dtype)),
    "pointers that start late": ("csr", "bfloat16", "row_pointers", lambda t: t.clamp(min=1)),
    "pointers that stop early": ("csr", "bfloat16", "row_pointers", lambda t: t.clamp(max=3)),
    "a mask that counts more 8-bit values": ("bitmask", "int8", "mask", lambda t: t | 1),
    "8-bit values of another dtype": ("dense", "int8", "values", lambda t: t.float()),
    "a mask that counts two more 4-bit values": ("bitmask", "int4", "mask", lambda t: t | 3),
    "a mask that counts fewer 6-bit values": ("bitmask", "int6", "mask", lambda t: t & 1),
    "6-bit values too many": ("dense", "int6", "values", lambda t: torch.cat([t, t[:1]])),
    "4-bit values of another dtype": ("dense", "int4", "values", lambda t: t.to(torch.int8)),
    "padding bits of 6-bit values": ("dense", "int6", "values", lambda t: torch.cat([t[:-1], t[-1:] | 0x80])),
    "a 4-bit scale of zero": ("bitmask", "int4", "scales", lambda t: t * 0),
    "a 4-bit scale that is NaN": ("bitmask", "int4", "scales", lambda t: t * torch.nan),
    "a subnormal 4-bit scale": ("dense", "int4", "scales", lambda t: torch.full_like(t, -(2.0**-127))),
    "a 4-bit scale whose products overflow": ("dense", "int4", "scales", lambda t: torch.full_like(t, -(2.0**125))),
    "a 4-bit scale of 17 significant bits": ("dense", "int4", "scales", lambda t: torch.full_like(t, 1 + 2.0**-16)),
    "scales of another dtype": ("dense", "int8", "scales", lambda t: t.bfloat16()),
    "scales of another shape": ("csr", "int8", "scales", lambda t: t[:1]),
    "one scale for all": ("bitmask", "int8", "scales", lambda t: t[0]),
} | {
    f"{what}, {name}": (name, "int8", key, change)
    for name in ("bitmask", "csr", "dense")
    for what, key, change in [
        ("the value -128", "values", lambda t: torch.where(t == -85, -128, t).to(torch.int8)),
        ("a scale that is NaN", "scales", lambda t: t * torch.nan),
        ("an infinite scale", "scales", lambda t: t / 0),
        ("a negative scale", "scales", lambda t: -t),
        ("a scale of zero", "scales", lambda t: t * 0),
        ("a subnormal scale", "scales", lambda t: torch.full_like(t, 2.0**-127)),
        ("a scale whose products overflow", "scales", lambda t: torch.full_like(t, 33027 * 2.0**106)),
        ("a scale of 17 significant bits", "scales", lambda t: torch.full_like(t, 1 + 2.0**-16)),
    ]
}


@pytest.mark.parametrize("what", DAMAGE)
def test_tensors_that_contradict_each_other_are_refused(what):
    name, value_dtype, key, change = DAMAGE[what]
    codec = FORMATS.create(name)
    packed = codec.pack(GOLDEN, value_dtype)
    damaged = PackedCoefficients(name, 3, 2, value_dtype, packed.tensors | {key: change(packed.tensors[key])})
    for method in (codec.check, codec.unpack):
        with pytest.raises(CheckpointError):
            method(damaged)


def test_a_missing_tensor_is_named():
    packed = FORMATS.create("bitmask").pack(GOLDEN, "float32")
    del packed.tensors["mask"]
    with pytest.raises(CheckpointError, match="mask"):
        FORMATS.create("bitmask").unpack(packed)


def nearest_atoms(atoms, dictionary_dtype):
    grid = grid_of(dictionary_dtype)
    if grid is not None:
        return nearest_whole(atoms, grid.bits, grid.group)[2]
    return atoms.to(getattr(torch, dictionary_dtype))


@pytest.mark.parametrize("dictionary_dtype", [None, *STORED_DICTIONARIES])
@pytest.mark.parametrize(("name", "value_dtype"), CASES)
def test_a_group_survives_packing(name, value_dtype, dictionary_dtype):
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(10, 7, generator=generator) * (torch.rand(10, 7, generator=generator) < 0.4)
    group = SparseFactorization(torch.randn(65, 10, generator=generator), {"a.q": sparse, "a.k": sparse[:, :3]})
    bias = torch.arange(3.0)
    spec, tensors = pack_group(group, name, value_dtype, {"a.k": bias}, True, dictionary_dtype)
    assert GroupSpec.from_dict(spec.to_dict()) == spec
    assert torch.equal(tensors["a.k.bias"], bias)
    assert "a.k.dictionary" not in tensors
    assert spec.dictionary_dtype == (dictionary_dtype or dictionary_dtype_of(value_dtype))
    own = {key: (tuple(t.shape), t.dtype) for key, t in tensors.items() if key.startswith("a.q.dictionary")}
    layout = dictionary_layout(10, 65, spec.dictionary_dtype)
    assert own == {f"a.q.{local}": what for local, what in layout.items()}
    assert ("a.q.dictionary_scales" in tensors) == spec.dictionary_dtype.startswith("int")
    back = unpack_group(spec, tensors)
    expected = nearest_atoms(group.dictionary.T, spec.dictionary_dtype).T
    assert (back.dictionary.dtype, back.dictionary.tolist()) == (expected.dtype, expected.tolist())
    again = pack_group(back, name, value_dtype, {"a.k": bias}, True, dictionary_dtype)
    assert (again[0], again[1].keys()) == (spec, tensors.keys())
    assert all(torch.equal(again[1][key], tensors[key]) for key in tensors)
    for member in group.coefficients:
        assert torch.equal(back.coefficients[member], nearest_even(group.coefficients[member], value_dtype))
    with pytest.raises(CheckpointError, match=r"a\.q\.dictionary: missing"):
        unpack_group(spec, {})


@pytest.mark.parametrize("dictionary_dtype", [d for d in DICTIONARY_DTYPES if grid_of(d)])
@pytest.mark.parametrize(("name", "value_dtype"), [case for case in CASES if grid_of(case[1])])
def test_numbers_that_lie_on_grids_are_packed_exactly(name, value_dtype, dictionary_dtype):
    """Whole numbers and scales of any choice, as rounding that looks at the error of the layer makes them."""
    generator = torch.Generator().manual_seed(0)

    def on_grid(dtype, n_rows, n):
        grid = grid_of(dtype)
        scales = torch.randn(scale_shape(n_rows, n, grid), generator=generator)
        scales = representable_scales(scales, grid)
        whole = torch.randint(-3, 4, (n_rows, n), generator=generator).clamp(grid.lowest, grid.highest)
        return dequantize(whole.to(torch.int8), scales, grid), scales

    atoms, atom_scales = on_grid(dictionary_dtype, 10, 70)
    rows, scales = on_grid(value_dtype, 7, 10)
    group = SparseFactorization(atoms.T, {"a.q": rows.T}, atom_scales, {"a.q": scales})
    spec, tensors = pack_group(group, name, value_dtype, {}, True, dictionary_dtype)
    assert torch.equal(tensors["a.q.dictionary_scales"], atom_scales)
    assert torch.equal(tensors["a.q.scales"], scales)
    back = unpack_group(spec, tensors)
    assert torch.equal(back.dictionary, group.dictionary)
    assert torch.equal(back.coefficients["a.q"], group.coefficients["a.q"])
    unaware = pack_group(SparseFactorization(atoms.T, {"a.q": rows.T}), name, value_dtype, {}, True, dictionary_dtype)
    assert not torch.equal(unaware[1]["a.q.scales"], scales)


def test_scales_that_fit_nothing_are_refused():
    atoms, sparse = torch.ones(6, 4), torch.ones(4, 3)
    for wrong in (torch.ones(3), torch.ones(())):
        with pytest.raises(ValueError, match="do not fit 4 atoms"):
            SparseFactorization(atoms, {"q": sparse}, wrong)
    for wrong in ({"k": torch.ones(3)}, {"q": torch.ones(4)}):
        with pytest.raises(ValueError, match="fit no coefficients"):
            SparseFactorization(atoms, {"q": sparse}, None, wrong)
    with pytest.raises(UsageError, match="bfloat16 has no scales"):
        pack_group(SparseFactorization(atoms, {"q": sparse}, torch.ones(4)), "bitmask", "bfloat16", {}, True)
    group = SparseFactorization(atoms, {"q": sparse}, None, {"q": torch.ones(3)})
    with pytest.raises(UsageError, match="bfloat14 has no scales"):
        pack_group(group, "bitmask", "bfloat14", {}, True)
    with pytest.raises(ValueError, match=r"found scales of shape \(4,\), expected \(4, 1\)"):
        pack_group(SparseFactorization(atoms, {"q": sparse}, torch.ones(4)), "bitmask", "int8", {}, True, "int4g64")
    for wrong in (torch.full((4,), 1 + 2.0**-20), torch.zeros(4), -torch.ones(4), torch.full((4,), 1e38)):
        with pytest.raises(NumericalError, match=r"q\.dictionary: a scale is not one that a file can hold"):
            pack_group(SparseFactorization(atoms, {"q": sparse}, wrong), "bitmask", "int8", {}, True)
    with pytest.raises(UsageError, match="'int4' is no dtype of a dictionary: choose bfloat16"):
        pack_group(SparseFactorization(atoms, {"q": sparse}), "bitmask", "int4", {}, True, "int4")


@pytest.mark.parametrize("dictionary_dtype", [None, *STORED_DICTIONARIES])
def test_group_bits_counts_the_packed_tensors(dictionary_dtype):
    sparse = torch.zeros(16, 12)
    sparse[:4] = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).sign()  # no entry rounds to zero
    group = SparseFactorization(torch.ones(70, 16), {"q": sparse, "k": sparse[:, :8]})
    for name, value_dtype in CASES:
        _, tensors = pack_group(group, name, value_dtype, {}, False, dictionary_dtype)
        counted = group_bits(70, 16, [12, 8], 4, FORMATS.create(name), value_dtype, dictionary_dtype)
        assert 8 * sum(t.nbytes for t in tensors.values()) == counted


def test_a_bad_number_names_its_layer():
    group = SparseFactorization(torch.ones(2, 3), {"a.q": torch.full((3, 2), float("nan"))})
    with pytest.raises(NumericalError, match=r"a\.q: the coefficients"):
        pack_group(group, "bitmask", "bfloat16", {}, shared_input=False)
    group = SparseFactorization(torch.full((2, 3), 1e9), {"a.q": torch.ones(3, 2)})
    with pytest.raises(NumericalError, match=r"a\.q\.dictionary"):
        pack_group(group, "bitmask", "float16", {}, shared_input=False)
