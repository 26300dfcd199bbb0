"""Every backend against the product in float64: one suite for all of them."""

from dataclasses import replace
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.dense_products import DenseCoefficients
from cospadi.backends.torch_sparse import SparseRows, TorchBackend
from cospadi.errors import UsageError
from cospadi.formats.base import FORMATS, PackedDictionary
from cospadi.formats.quantization import dequantize, grid_of, representable_scales
from tests.backends.backend_cases import (
    BACKEND_CASES,
    CPU,
    DISTINCT_CASES,
    GPU_BACKENDS,
    STORED,
    STORED_DICTIONARIES,
    TOKENS,
    UNIT,
    Case,
    Prepared,
    check,
    check_product,
    corners,
    device_of,
    dtypes_of,
    input_shapes,
    parameters,
    poisoned_memory,
    quantised,
)

every_backend = pytest.mark.parametrize(("name", "options"), parameters(BACKEND_CASES))
each_kernel = pytest.mark.parametrize(("name", "options"), parameters(DISTINCT_CASES))

# Kernels that compute a column of y without looking at the others: the same bits in any company.
OWN_KERNELS = [case for case in BACKEND_CASES if case[0] == "cpu" and case[1].get("max_tokens")]

SHAPES = {
    "odd": {},
    "whole": {"n_atoms": 128, "in_features": 64, "widths": (32,), "density": 1.0},
    "one": {"n_atoms": 1, "in_features": 1, "widths": (1, 1)},
    "thin": {"n_atoms": 3, "in_features": 200, "widths": (2, 1, 3), "density": 0.0},
    "ragged": {"density": None, "n_atoms": 150, "widths": (37, 16, 5)},
}


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right_for_any_number_of_tokens(name, options, shape):
    for dtype in dtypes_of(name, options):
        for value_dtype in ("bfloat16", "float32", "int8") if shape == "odd" else ("bfloat16", "int8"):
            prepared = Prepared(Case(**SHAPES[shape], dtype=dtype, value_dtype=value_dtype), name, options)
            D, S = prepared.case.stored()
            for n_tokens in TOKENS:
                x = replace(prepared.case, n_tokens=n_tokens).x()
                check_product(x, D, S, prepared(x))


@every_backend
def test_every_stored_dtype_runs_in_every_dtype(name, options):
    for start, dtype in enumerate(dtypes_of(name, options)):
        dictionaries = cycle(STORED_DICTIONARIES[start:] + STORED_DICTIONARIES[:start])
        for (format, value_dtype), dictionary_dtype in zip(STORED, dictionaries, strict=False):
            fields = {"format": format, "value_dtype": value_dtype, "dictionary_dtype": dictionary_dtype}
            case = Case(dtype=dtype, density=None, in_features=70, **fields)
            check(case, Prepared(case, name, options)())


@every_backend
def test_layers_that_are_only_quantised_run_in_every_dtype(name, options):
    for dtype in dtypes_of(name, options):
        for dictionary_dtype, width in zip(STORED_DICTIONARIES, cycle((91, 64, 1)), strict=False):
            prepared = Prepared(quantised(width, dictionary_dtype, in_features=70, dtype=dtype), name, options)
            D, S = prepared.case.stored()
            for n_tokens in (1, 9, 40):
                x = replace(prepared.case, n_tokens=n_tokens).x()
                check_product(x, D, S, prepared(x))
            assert torch.equal(prepared(member=0), prepared())


@each_kernel
def test_scales_of_any_choice_are_kept_in_every_format(name, options):
    """Coefficients whose scales are not those of their largest magnitudes, of both signs."""
    generator = torch.Generator().manual_seed(0)
    for value_dtype in ("int8", "int6", "int4"):
        grid = grid_of(value_dtype)
        scales = torch.rand(42, generator=generator) + 0.5
        scales[::2] *= -1.0 if grid.signed_scales else 1.0
        scales = representable_scales(scales, grid)
        whole = torch.randint(-3, 4, (42, 75), generator=generator).to(torch.int8)
        S = dequantize(whole, scales, grid).T
        for format in ("bitmask", "dense"):
            codec = FORMATS.create(format)
            members = [codec.pack(S[:, :37], value_dtype, scales[:37]), codec.pack(S[:, 37:], value_dtype, scales[37:])]
            case = Case(dtype=dtypes_of(name, options)[0])
            D, _ = case.stored()
            check_product(case.x(), D, S.double(), Prepared(case, name, options, members=members)())


@every_backend
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_products_are_right_for_any_layer(name, options, data):
    format, value_dtype = data.draw(st.sampled_from(STORED))
    case = Case(
        n_tokens=data.draw(st.integers(1, 20)),
        n_atoms=data.draw(st.integers(1, 200)),
        in_features=data.draw(st.integers(1, 200)),
        widths=tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))),
        density=data.draw(st.sampled_from([None, 0.0, 0.02, 0.5, 0.95, 1.0])),
        dtype=data.draw(st.sampled_from(dtypes_of(name, options))),
        format=format,
        value_dtype=value_dtype,
        dictionary_dtype=data.draw(st.sampled_from([None, *STORED_DICTIONARIES])),
        seed=data.draw(st.integers(0, 99)),
    )
    member = data.draw(st.sampled_from([None, *range(len(case.widths))]))
    check(case, Prepared(case, name, options)(member=member), member)


@every_backend
def test_the_columns_of_one_layer_are_those_that_it_has_among_all(name, options):
    for dtype, value_dtype in corners(name, options):
        for n_tokens in (1, 17):
            case = Case(n_tokens=n_tokens, dtype=dtype, value_dtype=value_dtype, widths=(37, 1, 16), density=None)
            prepared = Prepared(case, name, options)
            for member, expected in enumerate(prepared().split(case.widths, dim=1)):
                alone = prepared(member=member)
                check(case, alone, member)
                if (name, options) in OWN_KERNELS:
                    assert torch.equal(alone, expected)


@every_backend
def test_the_same_call_gives_the_same_bits(name, options):
    for dtype, value_dtype in corners(name, options):
        for n_tokens in (1, 64):
            case = Case(n_tokens, 300, 200, (130, 70), dtype=dtype, value_dtype=value_dtype)
            prepared = Prepared(case, name, options)
            first = prepared()
            assert torch.equal(prepared(), first)
            assert torch.equal(Prepared(case, name, options)(), first)


@pytest.mark.parametrize(("name", "options"), parameters(OWN_KERNELS))
def test_the_number_of_threads_changes_no_bit(name, options):
    """At sizes where the kernels do share their work."""
    threads = torch.get_num_threads()
    try:
        for dtype, value_dtype in corners(name, options):
            sparse = Case(3, 700, 500, (300, 201), dtype=dtype, value_dtype=value_dtype)
            alone = quantised(701, value_dtype, n_tokens=3, in_features=500, dtype=dtype)
            for case in (sparse, alone):
                prepared, found = Prepared(case, name, options), []
                for count in (1, 2, 5):
                    torch.set_num_threads(count)
                    found.append(prepared())
                check(case, found[0])
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


@each_kernel
def test_twice_the_input_gives_exactly_twice_the_output(name, options):
    for dtype, value_dtype in corners(name, options):
        case = Case(9, dtype=dtype, value_dtype=value_dtype)
        prepared = Prepared(case, name, options)
        y = prepared()
        # Outputs that are subnormal in float16 are rounded more coarsely than their doubles.
        normal = y.abs() >= torch.finfo(dtype).tiny
        assert int(normal.sum()) > 0.99 * y.numel()
        assert torch.equal(prepared(2 * case.x())[normal], 2 * y[normal])


@each_kernel
def test_the_order_of_the_atoms_does_not_matter(name, options):
    order = torch.randperm(131, generator=torch.Generator().manual_seed(9))
    for dtype, value_dtype in corners(name, options):
        case = Case(dtype=dtype, value_dtype=value_dtype, n_atoms=131, density=None)
        stored = case.dictionary()
        dictionary = PackedDictionary(
            stored.values[order], None if stored.scales is None else stored.scales[order].contiguous()
        )
        members = [FORMATS.create("bitmask").pack(S[order], value_dtype) for S in case.coefficients()]
        check(case, Prepared(case, name, options, dictionary, members)())


@each_kernel
def test_columns_without_coefficients_give_exact_zeros(name, options):
    for dtype, value_dtype in corners(name, options):
        case = Case(9, dtype=dtype, value_dtype=value_dtype)
        for columns in (slice(0, 37), slice(11, 12)):
            S = torch.cat(case.coefficients(), dim=1)
            S[:, columns] = 0
            members = [FORMATS.create("bitmask").pack(part, value_dtype) for part in S.split(case.widths, dim=1)]
            y = Prepared(case, name, options, members=members)()
            assert bool((y[:, columns] == 0).all())
            assert int((y != 0).sum()) == 9 * int((S != 0).any(dim=0).sum())


@each_kernel
def test_tokens_do_not_touch_each_other(name, options):
    for dtype, value_dtype in corners(name, options):
        case = Case(7, dtype=dtype, value_dtype=value_dtype)
        x, prepared = case.x(), Prepared(case, name, options)
        y, others = prepared(x), [0, 1, 2, 3, 5, 6]
        changed = x.clone()
        changed[4] *= 100
        assert torch.equal(prepared(changed)[others], y[others])


@each_kernel
def test_inputs_of_every_shape_through_the_modules(name, options):
    for dtype in dtypes_of(name, options):
        case = Case(dtype=dtype, in_features=11, n_atoms=19, widths=(23, 6))
        layers = case.modules(name, options)
        D, S = case.stored()
        for what, x in input_shapes(case).items():
            with poisoned_memory(), torch.no_grad():
                y = torch.cat([layer(x.to(device_of(name))) for layer in layers.values()], dim=-1)
            assert (y.shape, y.dtype) == ((*x.shape[:-1], 29), dtype), what
            check_product(x.reshape(-1, 11), D, S, y.reshape(-1, 29))


def test_the_poison_is_seen():
    """The suite rests on it: memory that a kernel does not write holds NaN, or the largest integer."""
    with poisoned_memory():
        assert bool(torch.empty(100).isnan().all())
        assert bool(torch.zeros(1, dtype=torch.bfloat16).new_empty(7, 9).isnan().all())
        assert bool((torch.empty(100, dtype=torch.uint8) == 255).all())


def test_a_wrong_product_is_seen():
    for dtype in UNIT:
        case = Case(dtype=dtype)
        D, S = case.stored()
        S[3, 7] += 0.5
        y = (case.x().double() @ D @ S).to(dtype)
        with pytest.raises(AssertionError):
            check(case, y)


def test_the_torch_backend_chooses_compressed_rows_by_density_and_dtype():
    for density, dtype, choice, expected in (
        (0.05, torch.float32, {}, SparseRows),
        (0.05, torch.bfloat16, {}, DenseCoefficients),
        (0.5, torch.float32, {}, DenseCoefficients),
        (0.5, torch.float32, {"coefficients": "sparse"}, SparseRows),
        (0.05, torch.float32, {"coefficients": "dense"}, DenseCoefficients),
    ):
        prepared = TorchBackend(**choice).prepare_coefficients(Case(density=density).members(), Placement(CPU, dtype))
        assert type(prepared) is expected


def test_what_a_backend_does_not_run_is_refused_with_a_reason():
    packed = Case().members()[0]
    state = TorchBackend(coefficients="sparse").supports(packed, Placement(CPU, torch.bfloat16))
    assert not state
    assert "float32 and float64 only" in state.reason
    for name in BACKENDS.names():
        state = BACKENDS.create(name).supports(packed, Placement(CPU, torch.int8))
        assert not state
        assert state.reason
    for name in GPU_BACKENDS:
        state = BACKENDS.availability(name)
        assert state.ok or "GPU" in state.reason
        assert "cpu" in BACKENDS.create(name).supports(packed, Placement(CPU, torch.float32)).reason


def test_an_unknown_backend_or_option_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        BACKENDS.create("torhc")
    for name, option, value in (
        ("torch", "coefficients", "thin"),
        ("cpu", "max_tokens", -1),
        ("cpu", "instructions", "sse"),
        ("cuda", "combine_tokens", -1),
    ):
        with pytest.raises(UsageError, match=option):
            BACKENDS.create(name, {option: value})
