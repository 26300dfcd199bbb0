"""Rows of whole numbers with one scale each: exact products, half a step of error, and the same bytes again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError, NumericalError
from cospadi.formats.dictionary import (
    DICTIONARY_DTYPES,
    dictionary_bits,
    pack_dictionary,
    packed_dictionary,
    unpack_dictionary,
)
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.formats.quantization import (
    GRIDS,
    check_quantized,
    check_scales,
    dequantize,
    quantize,
    representable_scales,
    scale_shape,
)

from .references import nearest_whole

INT8 = GRIDS["int8"]
HUGE = torch.finfo(torch.float32).max
PROFILE = settings(max_examples=200, deadline=None)

# Any float32, from the smallest subnormal number to the largest, with the ends and the borders named.
numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-(2.0**-117), 2.0**-117, width=32),
    st.floats(-(2.0**-145), 2.0**-145, width=32),
    st.sampled_from([0.0, -0.0, HUGE, -HUGE, 2.0**-149, 2.0**-126, 127 * 2.0**-126, 127.5 * 2.0**-126, 2.0**-127]),
    st.integers(-(2**24), 2**24).map(lambda n: n / 127),
)


def widths_for(grid):
    """Lengths of a row: short, and around whole groups where there are some."""
    if grid.group is None:
        return st.integers(1, 6)
    return st.one_of(st.integers(1, 6), st.sampled_from([grid.group - 1, grid.group, grid.group + 1, 2 * grid.group]))


def matrices_for(grid):
    """Rows of any numbers, of those lengths; the numbers of a long row repeat a few, at any place."""
    return widths_for(grid).flatmap(matrices)


@st.composite
def matrices(draw, width=None):
    if width is not None and width > 6:
        few = torch.tensor(draw(st.lists(numbers, min_size=2, max_size=6)), dtype=torch.float32)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        return few[torch.randint(len(few), (2, width), generator=generator)]
    width = width or draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4))
    return torch.tensor(rows, dtype=torch.float32)


@pytest.mark.parametrize("name", GRIDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_numbers_are_those_of_exact_arithmetic(name, data):
    rows, grid = data.draw(matrices_for(GRIDS[name])), GRIDS[name]
    before = rows.clone()
    values, scales = quantize(rows, grid)
    assert torch.equal(rows, before)
    whole, exact, products = nearest_whole(rows, grid.bits, grid.group)
    assert (values.dtype, scales.dtype) == (torch.int8, exact.dtype)
    assert torch.equal(values.to(torch.int64), whole)
    assert torch.equal(scales, exact)
    assert torch.equal(dequantize(values, scales, grid), products)


@given(matrices())
@PROFILE
def test_the_error_in_8_bits_is_at_most_half_a_scale(rows):
    values, scales = quantize(rows, INT8)
    exact = values.to(torch.float64) * scales.to(torch.float64)[:, None]
    assert bool(((rows.to(torch.float64) - exact).abs() <= scales.to(torch.float64)[:, None] / 2).all())
    full = values.abs().amax(dim=1) == 127
    assert bool((full | (scales == 2.0**-126)).all())


@pytest.mark.parametrize("name", [name for name in GRIDS if name != "int8"])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_the_error_in_few_bits_is_at_most_half_a_scale_but_for_what_is_clipped(name, data):
    grid = GRIDS[name]
    rows = data.draw(matrices_for(grid))
    values, scales = quantize(rows, grid)
    width = rows.shape[1]
    wide = scales[:, None] if grid.group is None else scales.repeat_interleave(grid.group, dim=1)[:, :width]
    quotients = rows.to(torch.float64) / wide.to(torch.float64)
    assert bool(((quotients - quotients.clamp(grid.lowest, grid.highest) == 0) | (values != 0)).all())
    assert bool(((quotients.clamp(grid.lowest, grid.highest) - values).abs() <= 0.5).all())
    assert bool(((quotients - values).abs() < 1.2).all())  # one level, and the rounding of the scale to 8 bits


@pytest.mark.parametrize("name", GRIDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_products_are_exact_and_normal_and_stored_as_the_same_bytes(name, data):
    rows, grid = data.draw(matrices_for(GRIDS[name])), GRIDS[name]
    values, scales = quantize(rows, grid)
    check_quantized("values", values, grid)
    check_scales("scales", scales, grid)
    assert scales.shape == scale_shape(*rows.shape, grid)
    read = dequantize(values, scales, grid)
    assert read.is_contiguous()
    assert bool(torch.isfinite(read).all())
    assert bool(((read == 0) | (read.abs() >= torch.finfo(torch.float32).tiny)).all())
    for given_scales in (None, scales, scales.double()):
        again, same = quantize(read, grid, given_scales)
        assert torch.equal(again, values)
        assert torch.equal(same, scales)
        assert same.dtype == grid.scale_dtype


@pytest.mark.parametrize("name", GRIDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_numbers_on_the_grid_of_any_scales_are_stored_exactly(name, data):
    """Rounding that knows better than the nearest number chooses scales and whole numbers of its own."""
    grid = GRIDS[name]
    n_rows, width = data.draw(st.integers(1, 3)), data.draw(widths_for(grid))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = scale_shape(n_rows, width, grid)
    exponents = 10.0 ** torch.randint(-50, 50, shape, generator=generator).double()
    wanted = torch.randn(shape, generator=generator, dtype=torch.float64) * exponents
    scales = representable_scales(wanted, grid)
    check_scales("scales", scales, grid)
    assert torch.equal(representable_scales(scales, grid), scales)
    whole = torch.randint(grid.lowest, grid.highest + 1, (n_rows, width), generator=generator).to(torch.int8)
    values, same = quantize(dequantize(whole, scales, grid), grid, scales)
    assert torch.equal(values, whole)
    assert torch.equal(same, scales)
    dictionary = dequantize(whole, scales, grid).T
    if name in DICTIONARY_DTYPES:
        packed = pack_dictionary(dictionary, name, scales)
        assert torch.equal(unpack_dictionary(packed).T, dictionary)
        assert 8 * (packed.values.nbytes + packed.scales.nbytes) == dictionary_bits(n_rows, width, name)
        assert packed.in_features == width


@given(matrices(), st.integers(-30, 30))
@PROFILE
def test_a_power_of_two_scales_the_scales_alone(rows, exponent):
    """Away from the ends of the range, where the scale is neither held at 2^-126 nor beyond float32."""
    rows = torch.where(rows.abs() < 2.0**60, rows, 0.0)
    rows[:, 0] = torch.where(rows.abs().amax(dim=1) < 2.0**-60, 1.0, rows[:, 0])
    values, scales = quantize(rows.to(torch.float64), INT8)
    other, scaled = quantize(rows.to(torch.float64) * 2.0**exponent, INT8)
    assert torch.equal(values, other)
    assert torch.equal(scaled, scales * 2.0**exponent)


@given(matrices(), st.randoms(use_true_random=False))
@PROFILE
def test_rows_and_signs_and_order_do_not_matter_to_each_other(rows, random):
    values, scales = quantize(rows, INT8)
    order = list(range(rows.shape[1]))
    random.shuffle(order)
    assert torch.equal(quantize(-rows[:, order], INT8)[0], -values[:, order])
    for row, value, scale in zip(rows, values, scales, strict=True):
        alone = quantize(row[None], INT8)
        assert torch.equal(alone[0][0], value)
        assert alone[1].item() == scale.item()


@pytest.mark.parametrize("first", range(2**15, 2**16, 2**13))
def test_every_tie_and_its_neighbours_for_every_scale(first):
    """A quotient in float32 could round onto a tie that the exact one misses; float64 cannot, and gives the same."""
    scales = torch.arange(first, first + 2**13, dtype=torch.float32)[:, None]
    ties = (torch.arange(127) + 0.5) * scales
    up, down = (torch.nextafter(ties, torch.tensor(end)) for end in (torch.inf, 0.0))
    rows = torch.cat([127 * scales, ties, up, down], dim=1)
    values, found = quantize(rows, INT8)
    assert torch.equal(found[:, None], scales)
    assert torch.equal(values.to(torch.float64), (rows.to(torch.float64) / scales).round())


def test_zeros_and_the_ends_of_the_range():
    values, scales = quantize(torch.tensor([[0.0, -0.0], [HUGE, -HUGE], [2.0**-149, 2.0**-127], [-1.0, 0.0]]), INT8)
    assert values.tolist() == [[0, 0], [127, -127], [0, 0], [-127, 0]]  # 2^-127 is a tie, and zero is even
    assert scales.tolist() == [2.0**-126, 33026 * 2.0**106, 2.0**-126, 33026 * 2.0**-22]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_refused(bad, dtype):
    with pytest.raises(NumericalError, match="NaN or infinity"):
        quantize(torch.tensor([[1.0, 2.0], [bad, 1.0]], dtype=dtype), INT8)


def test_numbers_beyond_float32_are_refused():
    with pytest.raises(NumericalError, match=r"magnitude 1e\+39 overflows"):
        quantize(torch.tensor([[1.0, -1e39]], dtype=torch.float64), INT8)


@pytest.mark.parametrize("scale", [2.0**-126, 1.0, 65535.0, 33026 * 2.0**106])
def test_scales_within_the_bounds_are_accepted(scale):
    check_scales("scales", torch.tensor([1.0, scale]), INT8)


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, 2.0**-127, 2.0**-149, 65537.0, 33027 * 2.0**106, HUGE, float("inf"), float("nan")]
)
def test_scales_beyond_the_bounds_are_refused(scale):
    with pytest.raises(CheckpointError, match="scales: holds a scale"):
        check_scales("scales", torch.tensor([1.0, scale]), INT8)


def test_an_atom_has_its_own_scale_whatever_the_others_are():
    generator = torch.Generator().manual_seed(0)
    dictionary = torch.randn(6, 5, generator=generator) * 10.0 ** torch.arange(-20, 30, 10)
    packed = pack_dictionary(dictionary, "int8")
    assert (packed.values.shape, packed.values.dtype) == ((5, 6), torch.int8)
    assert packed.values.abs().amax(dim=1).tolist() == [127] * 5
    assert 8 * (packed.values.nbytes + packed.scales.nbytes) == dictionary_bits(5, 6, "int8")
    error = (unpack_dictionary(packed).T - dictionary).norm(dim=0) / dictionary.norm(dim=0)
    assert bool((error < 0.01).all())
    assert bool((error > 0).any())


def test_the_bytes_of_a_dictionary_are_those_of_the_documentation():
    atoms = torch.tensor([[1.0, 0.0, 0.5], [0.0, -2.0, 3.0]])
    packed = pack_dictionary(atoms.T, "int3g32")
    assert packed.values.numpy().tobytes().hex() == "a0003c00"
    assert packed.scales.view(torch.uint8).numpy().tobytes().hex() == "80be40bf"
    assert packed.values.shape == (2, 2)


def test_every_group_has_its_own_scale():
    atoms = torch.cat([torch.full((2, 64), 1e-6), torch.full((2, 64), -1e6), torch.full((2, 3), 1.0)], dim=1)
    packed = pack_dictionary(atoms.T, "int4g64")
    assert packed.scales.shape == (2, 3)
    assert unpack_dictionary(packed).sub(atoms).abs().div(atoms.abs()).max() < 2.0**-8


@pytest.mark.parametrize("name", [n for n in GRIDS if GRIDS[n].signed_scales])
def test_the_extra_level_is_on_the_side_of_the_largest_magnitude(name):
    grid = GRIDS[name]
    for sign in (1, -1):
        values, scales = quantize(sign * torch.tensor([[4.0, -3.9, 1.0]]), grid)
        assert values[0, 0] == grid.lowest
        assert values[0, 1] == grid.highest
        assert bool((scales < 0).all()) == (sign == 1)


def test_scales_are_rounded_to_what_a_file_holds():
    wanted = torch.tensor([0.0, -0.0, 1e-44, -1e-44, 1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-9, 3e38, -3e38])
    grouped, whole = representable_scales(wanted, GRIDS["int4g64"]), representable_scales(wanted, INT8)
    tiny, most = 2.0**-126, 255 * 2.0**117
    assert grouped.tolist() == [tiny, tiny, tiny, -tiny, 1, 1 + 2.0**-6, -1, most, -most]
    assert grouped.dtype == torch.bfloat16
    assert whole[-2:].tolist() == [33026 * 2.0**106] * 2
    assert (whole > 0).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(NumericalError, match="scales hold NaN or infinity"):
            representable_scales(torch.tensor([1.0, bad]), INT8)


DAMAGED = [
    ("int8", "dictionary", lambda t: t.float()),
    ("int8", "dictionary", lambda t: t.T),
    ("int8", "dictionary", lambda t: torch.full_like(t, -128)),
    ("int8", "dictionary_scales", lambda t: t.double()),
    ("int8", "dictionary_scales", lambda t: t[:, None]),
    ("int8", "dictionary_scales", lambda t: -t),
    *[
        (dtype, key, change)
        for dtype in ("int3g32", "int6g64")
        for key, change in [
            ("dictionary", lambda t: t.to(torch.int8)),
            ("dictionary", lambda t: t[:, :-1]),
            ("dictionary", lambda t: torch.cat([t, t[:, :1]], dim=1)),
            ("dictionary", lambda t: t | 0x80),
            ("dictionary_scales", lambda t: t.float()),
            ("dictionary_scales", lambda t: t.flatten()),
            ("dictionary_scales", lambda t: torch.cat([t, t], dim=1)),
            ("dictionary_scales", lambda t: t * 0),
            ("dictionary_scales", lambda t: torch.full_like(t, 2.0**-127)),
            ("dictionary_scales", lambda t: torch.full_like(t, -(2.0**-133))),
            ("dictionary_scales", lambda t: torch.full_like(t, 2.0**126)),
            ("dictionary_scales", lambda t: t / 0),
        ]
    ],
    *[
        (dtype, key, change)
        for dtype in ("int8", "int3g32", "int6g64")
        for key, change in [
            ("dictionary_scales", lambda t: t[:-1]),
            ("dictionary_scales", lambda t: t * torch.nan),
            ("dictionary_scales", lambda t: None),
        ]
    ],
]


@pytest.mark.parametrize(("dtype", "name", "change"), DAMAGED)
def test_a_damaged_dictionary_is_refused_by_name(dtype, name, change):
    # 42 bits of 6-bit numbers, 21 of 3-bit ones: both leave padding
    generator = torch.Generator().manual_seed(0)
    packed = pack_dictionary(torch.randn(7, 3, generator=generator), dtype)
    tensors = {"dictionary": packed.values, "dictionary_scales": packed.scales}
    assert packed_dictionary(tensors, 3, 7, dtype) == packed
    damaged = tensors | {name: change(tensors[name])}
    damaged = {key: tensor for key, tensor in damaged.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"^{name}: "):
        packed_dictionary(damaged, 3, 7, dtype)
    group = SparseFactorization(torch.ones(7, 3), {"a.q": torch.ones(3, 2)})
    spec, whole = pack_group(group, "bitmask", "bfloat16", {}, True, dtype)
    del whole[f"a.q.{name}"]
    whole.update({f"a.q.{key}": tensor for key, tensor in damaged.items() if key == name})
    with pytest.raises(CheckpointError, match=rf"^a\.q\.{name}: "):
        unpack_group(spec, whole)
