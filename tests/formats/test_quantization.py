"""Rows of whole numbers with one scale each: exact products, half a step of error, and the same bytes again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError, NumericalError
from cospadi.factorization import SparseFactorization
from cospadi.formats.dictionary import dictionary_bits, pack_dictionary, packed_dictionary, unpack_dictionary
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.formats.quantization import check_quantized, check_scales, dequantize_rows, quantize_rows

from .references import nearest_whole

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


@st.composite
def matrices(draw):
    width = draw(st.integers(1, 6))
    rows = draw(st.lists(st.lists(numbers, min_size=width, max_size=width), min_size=1, max_size=4))
    return torch.tensor(rows, dtype=torch.float32)


@given(matrices())
@PROFILE
def test_the_numbers_are_those_of_exact_arithmetic(rows):
    before = rows.clone()
    values, scales = quantize_rows(rows)
    assert torch.equal(rows, before)
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
    whole, exact, products = nearest_whole(rows)
    assert torch.equal(values.to(torch.int64), whole)
    assert torch.equal(scales, exact)
    assert torch.equal(dequantize_rows(values, scales), products)


@given(matrices())
@PROFILE
def test_the_error_is_at_most_half_a_scale_and_the_products_are_exact_and_normal(rows):
    values, scales = quantize_rows(rows)
    check_quantized("values", values)
    check_scales("scales", scales)
    read = dequantize_rows(values, scales)
    exact = values.to(torch.float64) * scales.to(torch.float64)[:, None]
    assert torch.equal(read.to(torch.float64), exact)
    assert bool(torch.isfinite(read).all())
    assert bool(((read == 0) | (read.abs() >= torch.finfo(torch.float32).tiny)).all())
    assert bool(((rows.to(torch.float64) - exact).abs() <= scales.to(torch.float64)[:, None] / 2).all())
    full = values.abs().amax(dim=1) == 127
    assert bool((full | (scales == 2.0**-126)).all())


@given(matrices())
@PROFILE
def test_what_was_read_is_stored_as_the_same_bytes(rows):
    values, scales = quantize_rows(rows)
    again, same = quantize_rows(dequantize_rows(values, scales))
    assert torch.equal(again, values)
    assert torch.equal(same, scales)


@given(matrices(), st.integers(-30, 30))
@PROFILE
def test_a_power_of_two_scales_the_scales_alone(rows, exponent):
    """Away from the ends of the range, where the scale is neither held at 2^-126 nor beyond float32."""
    rows = torch.where(rows.abs() < 2.0**60, rows, 0.0)
    rows[:, 0] = torch.where(rows.abs().amax(dim=1) < 2.0**-60, 1.0, rows[:, 0])
    values, scales = quantize_rows(rows.to(torch.float64))
    other, scaled = quantize_rows(rows.to(torch.float64) * 2.0**exponent)
    assert torch.equal(values, other)
    assert torch.equal(scaled, scales * 2.0**exponent)


@given(matrices(), st.randoms(use_true_random=False))
@PROFILE
def test_rows_and_signs_and_order_do_not_matter_to_each_other(rows, random):
    values, scales = quantize_rows(rows)
    order = list(range(rows.shape[1]))
    random.shuffle(order)
    assert torch.equal(quantize_rows(-rows[:, order])[0], -values[:, order])
    for row, value, scale in zip(rows, values, scales, strict=True):
        alone = quantize_rows(row[None])
        assert torch.equal(alone[0][0], value)
        assert alone[1].item() == scale.item()


@pytest.mark.parametrize("first", range(2**15, 2**16, 2**13))
def test_every_tie_and_its_neighbours_for_every_scale(first):
    """A quotient in float32 could round onto a tie that the exact one misses; float64 cannot, and gives the same."""
    scales = torch.arange(first, first + 2**13, dtype=torch.float32)[:, None]
    ties = (torch.arange(127) + 0.5) * scales
    up, down = (torch.nextafter(ties, torch.tensor(end)) for end in (torch.inf, 0.0))
    rows = torch.cat([127 * scales, ties, up, down], dim=1)
    values, found = quantize_rows(rows)
    assert torch.equal(found[:, None], scales)
    assert torch.equal(values.to(torch.float64), (rows.to(torch.float64) / scales).round())


def test_zeros_and_the_ends_of_the_range():
    values, scales = quantize_rows(torch.tensor([[0.0, -0.0], [HUGE, -HUGE], [2.0**-149, 2.0**-127], [-1.0, 0.0]]))
    assert values.tolist() == [[0, 0], [127, -127], [0, 0], [-127, 0]]  # 2^-127 is a tie, and zero is even
    assert scales.tolist() == [2.0**-126, 33026 * 2.0**106, 2.0**-126, 33026 * 2.0**-22]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_that_are_not_finite_are_refused(bad, dtype):
    with pytest.raises(NumericalError, match="NaN or infinity"):
        quantize_rows(torch.tensor([[1.0, 2.0], [bad, 1.0]], dtype=dtype))


def test_numbers_beyond_float32_are_refused():
    with pytest.raises(NumericalError, match=r"magnitude 1e\+39 overflows"):
        quantize_rows(torch.tensor([[1.0, -1e39]], dtype=torch.float64))


@pytest.mark.parametrize("scale", [2.0**-126, 1.0, 65535.0, 33026 * 2.0**106])
def test_scales_within_the_bounds_are_accepted(scale):
    check_scales("scales", torch.tensor([1.0, scale]))


@pytest.mark.parametrize(
    "scale", [0.0, -1.0, 2.0**-127, 2.0**-149, 65537.0, 33027 * 2.0**106, HUGE, float("inf"), float("nan")]
)
def test_scales_beyond_the_bounds_are_refused(scale):
    with pytest.raises(CheckpointError, match="scales: holds a scale"):
        check_scales("scales", torch.tensor([1.0, scale]))


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


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("dictionary", lambda t: t.float()),
        ("dictionary", lambda t: t.T),
        ("dictionary", lambda t: torch.full_like(t, -128)),
        ("dictionary_scales", lambda t: t.double()),
        ("dictionary_scales", lambda t: t[:, None]),
        ("dictionary_scales", lambda t: t[:-1]),
        ("dictionary_scales", lambda t: -t),
        ("dictionary_scales", lambda t: t * torch.nan),
        ("dictionary_scales", lambda t: None),
    ],
)
def test_a_damaged_dictionary_is_refused_by_name(name, change):
    packed = pack_dictionary(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), "int8")
    tensors = {"dictionary": packed.values, "dictionary_scales": packed.scales}
    assert packed_dictionary(tensors, 3, 4, "int8") == packed
    damaged = tensors | {name: change(tensors[name])}
    damaged = {key: tensor for key, tensor in damaged.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=f"^{name}: "):
        packed_dictionary(damaged, 3, 4, "int8")
    group = SparseFactorization(torch.ones(4, 3), {"a.q": torch.ones(3, 2)})
    spec, whole = pack_group(group, "bitmask", "int8", {}, shared_input=True)
    del whole[f"a.q.{name}"]
    whole.update({f"a.q.{key}": tensor for key, tensor in damaged.items() if key == name})
    with pytest.raises(CheckpointError, match=rf"^a\.q\.{name}: "):
        unpack_group(spec, whole)
