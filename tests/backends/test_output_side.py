"""Layers whose dictionary is on the side of the outputs, and the two products alone that they are made of."""

from dataclasses import dataclass, replace
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.sparse_linear import build_group
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group
from tests.backends.backend_cases import (
    BACKEND_CASES,
    DISTINCT_CASES,
    STORED,
    STORED_DICTIONARIES,
    Case,
    check_product,
    corners,
    device_of,
    dtypes_of,
    input_shapes,
    parameters,
    poisoned_memory,
)

TOKENS = (1, 8, 40)
SMALL = {"n_tokens": 6, "n_atoms": 19, "in_features": 11, "out_features": 7}

pytestmark = pytest.mark.usefixtures("fresh_compiler")

every_backend = pytest.mark.parametrize(("name", "options"), parameters(BACKEND_CASES))
each_kernel = pytest.mark.parametrize(("name", "options"), parameters(DISTINCT_CASES))

SHAPES = {
    "odd": {},
    "one": {"in_features": 1, "n_atoms": 1, "out_features": 1},
    "thin": {"in_features": 200, "n_atoms": 2, "out_features": 3, "density": 0.0},
    "wide": {"in_features": 3, "n_atoms": 70, "out_features": 91},
    "whole": {"density": 1.0, "in_features": 128, "n_atoms": 64, "out_features": 32},
}


@dataclass(frozen=True)
class Layer(Case):
    """A layer W^T = D S and an input; everything follows from the fields."""

    n_atoms: int = 45
    in_features: int = 75
    out_features: int = 37
    density: float | None = None  # None: another one for every atom, from none to all

    def factors(self):
        generator = torch.Generator().manual_seed(10 * self.seed + 5)
        density = torch.linspace(0, 1, self.n_atoms)[:, None] if self.density is None else self.density
        support = torch.rand(self.n_atoms, self.in_features, generator=generator) < density
        sparse = self._numbers(2, self.n_atoms, self.in_features) * support
        dictionary = self._numbers(0, self.out_features, self.n_atoms)
        return SparseFactorization(dictionary, {"down": sparse}, side="output")

    def packed(self):
        return pack_group(self.factors(), self.format, self.value_dtype, {}, True, self.dictionary_dtype)

    def stored(self):
        """Give S^T (in_features, n_atoms) and D^T (n_atoms, out_features), as stored, in float64."""
        factors = unpack_group(*self.packed())
        return factors.coefficients["down"].T.double(), factors.dictionary.T.double()

    def module(self, backend="torch", options=None):
        spec, tensors = self.packed()
        layer = build_group(spec, backend)["down"]
        layer.load_state_dict({key.removeprefix("down."): t for key, t in tensors.items()})
        if options:
            layer._bundle.backend = BACKENDS.create(backend, options)
        return layer


def run(layer, x, device):
    before = x.clone()
    with poisoned_memory(), torch.no_grad():
        y = layer(x.to(device))
    assert (y.shape[:-1], y.dtype, y.is_contiguous()) == (x.shape[:-1], x.dtype, True)
    assert torch.equal(x, before)
    return y.cpu()


# Products


@every_backend
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_right_for_any_number_of_tokens(name, options, shape):
    device = device_of(name)
    for dtype, value_dtype in corners(name, options):
        case = Layer(**SHAPES[shape], dtype=dtype, value_dtype=value_dtype)
        layer, (S, D) = case.module(name, options).to(device), case.stored()
        for n_tokens in TOKENS:
            x = replace(case, n_tokens=n_tokens).x()
            check_product(x, S, D, run(layer, x, device))


@every_backend
def test_every_stored_dtype_runs_in_every_dtype(name, options):
    device = device_of(name)
    for start, dtype in enumerate(dtypes_of(name, options)):
        dictionaries = cycle(("bfloat16", "int4g32", "int8")[start % 3 :])
        for (format, value_dtype), dictionary_dtype in zip(STORED, dictionaries, strict=False):
            fields = {"format": format, "value_dtype": value_dtype, "dictionary_dtype": dictionary_dtype}
            case = Layer(dtype=dtype, **fields)
            check_product(case.x(), *case.stored(), run(case.module(name, options).to(device), case.x(), device))


@every_backend
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_products_are_right_for_any_layer(name, options, data):
    device = device_of(name)
    format, value_dtype = data.draw(st.sampled_from(STORED))
    case = Layer(
        n_tokens=data.draw(st.integers(1, 40)),
        in_features=data.draw(st.integers(1, 200)),
        n_atoms=data.draw(st.integers(1, 100)),
        out_features=data.draw(st.integers(1, 100)),
        density=data.draw(st.sampled_from([None, 0.0, 0.02, 0.5, 1.0])),
        dtype=data.draw(st.sampled_from(dtypes_of(name, options))),
        format=format,
        value_dtype=value_dtype,
        dictionary_dtype=data.draw(st.sampled_from([None, *STORED_DICTIONARIES])),
        seed=data.draw(st.integers(0, 99)),
    )
    check_product(case.x(), *case.stored(), run(case.module(name, options).to(device), case.x(), device))


@every_backend
def test_the_coefficients_alone_are_a_product_without_a_dictionary(name, options):
    """The first of the two products, also of several layers and of one among them, which groups do not need yet."""
    device = device_of(name)
    for dtype, value_dtype in corners(name, options):
        case = Case(dtype=dtype, value_dtype=value_dtype, n_atoms=75, widths=(37, 1, 16), density=None)
        backend = BACKENDS.create(name, dict(options))
        coefficients = backend.prepare_coefficients(case.members(), Placement(device, dtype))
        S, identity = case.stored()[1], torch.eye(75, dtype=torch.float64)
        for n_tokens in TOKENS:
            x = Case(n_tokens, in_features=75, dtype=dtype).x().to(device)
            before = x.clone()
            for member, columns in ((None, S), *((m, S.split(case.widths, dim=1)[m]) for m in (1, 2))):
                with poisoned_memory():
                    y = backend.multiply(None, coefficients, x, member)
                assert y.is_contiguous()
                check_product(x, identity, columns, y)
            assert torch.equal(x, before)


@each_kernel
def test_tokens_that_are_not_numbers_stay_where_they_are(name, options):
    """Kernels read whole steps, past the end of a token: what lies there must count for nothing."""
    device = device_of(name)
    for dtype, value_dtype in corners(name, options):
        case = Layer(7, dtype=dtype, value_dtype=value_dtype)
        layer, x = case.module(name, options).to(device), case.x()
        y, others = run(layer, x, device), [0, 1, 2, 3, 5, 6]
        x[4] = torch.nan
        with torch.no_grad():
            spoiled = layer(x.to(device)).cpu()
        assert torch.equal(spoiled[others], y[others])
        assert bool(spoiled[4].isnan().any())


@each_kernel
def test_the_same_call_gives_the_same_bits_with_any_number_of_threads(name, options):
    device, threads = device_of(name), torch.get_num_threads()
    own_kernels = name == "cpu" and options.get("max_tokens")
    sizes = (400, 700, 300) if own_kernels else (40, 70, 30)  # large enough for several threads
    for dtype, value_dtype in corners(name, options):
        case = Layer(9, *sizes[:2], out_features=sizes[2], density=0.5, dtype=dtype, value_dtype=value_dtype)
        layer, x = case.module(name, options).to(device), case.x()
        first = run(layer, x, device)
        check_product(x, *case.stored(), first)
        try:
            for count in (1, 2, 5) if own_kernels else (1,):
                torch.set_num_threads(count)
                assert torch.equal(run(layer, x, device), first)
        finally:
            torch.set_num_threads(threads)


@each_kernel
def test_inputs_of_every_shape(name, options):
    case = Layer(dtype=dtypes_of(name, options)[0], in_features=11, n_atoms=19, out_features=23)
    layer = case.module(name, options).to(device_of(name))
    for x in input_shapes(case).values():
        y = run(layer, x, device_of(name))
        check_product(x.reshape(-1, 11), *case.stored(), y.reshape(-1, 23))


# The module


@pytest.mark.parametrize(
    ("format", "value_dtype", "dictionary_dtype"), [("bitmask", "bfloat16", None), ("dense", "int4", "int4g32")]
)
def test_the_dense_layer_is_the_product(format, value_dtype, dictionary_dtype):
    case = Layer(format=format, value_dtype=value_dtype, dictionary_dtype=dictionary_dtype)
    layer, (S, D) = case.module(), case.stored()
    assert (layer.in_features, layer.out_features, layer.n_atoms) == (75, 37, 45)
    assert "side=output" in repr(layer)
    torch.testing.assert_close(layer.to_dense(torch.float64), (S @ D).T, rtol=1e-12, atol=1e-12)
    dense = layer.to_dense_module(torch.float32)
    with torch.no_grad():
        check_product(case.x(), S, D, dense(case.x()))


def test_a_skeleton_on_the_meta_device_has_the_stored_tensors():
    for format, value_dtype in STORED:
        spec, tensors = Layer(format=format, value_dtype=value_dtype, dictionary_dtype="int3g32").packed()
        layer = build_group(spec, device="meta")["down"]
        found = {f"down.{key}": (t.shape, t.dtype, t.device.type) for key, t in layer.state_dict().items()}
        assert found == {key: (t.shape, t.dtype, "meta") for key, t in tensors.items()}


# The operator


def trained(layer):
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in ("values", "dictionary"))
    return layer


def arguments(layer, x):
    stored = [getattr(layer, name) for name in layer.coefficient_names]
    dictionary = [getattr(layer, name) for name in layer.dictionary_names]
    return x, dictionary, stored, layer._bundle._handle, 0


@pytest.mark.parametrize("value_dtype", ["float32", "int8"])
def test_the_operator_keeps_the_rules_of_torch(value_dtype):
    layer = Layer(in_features=11, n_atoms=19, out_features=7, value_dtype=value_dtype).module()
    for shape in ((2, 3, 11), (11,), (0, 11)):
        torch.library.opcheck(torch.ops.cospadi.linear.default, arguments(layer, torch.randn(shape)))
    if value_dtype == "float32":
        x, dictionary, stored, handle, _ = arguments(layer, torch.randn(3, 11))
        wanted = [True, True, *(tensor.is_floating_point() for tensor in stored)]
        backward = torch.ops.cospadi.linear_backward.default
        torch.library.opcheck(backward, (torch.randn(3, 7), x, dictionary, stored, handle, 0, wanted))
        x = torch.randn(3, 11, requires_grad=True)
        torch.library.opcheck(torch.ops.cospadi.linear.default, arguments(trained(layer), x))


@pytest.mark.parametrize(("format", "compiled"), [("bitmask", True), ("csr", False), ("dense", False)])
def test_gradients_are_those_of_plain_torch(format, compiled):
    case = Layer(**SMALL, format=format)
    layer = trained(case.module())
    call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x, g = torch.randn(2, 3, 11, dtype=torch.float64), torch.randn(2, 3, 7, dtype=torch.float64)
    own, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    S, D = (factor.requires_grad_() for factor in case.stored())
    (reference @ S @ D).backward(g)
    call(own).backward(g)
    torch.testing.assert_close(own.grad, reference.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.dictionary.grad.double(), D.grad.T, rtol=1e-6, atol=1e-6)
    to_values = S.grad.T if format == "dense" else S.grad.T[S.detach().T != 0]
    torch.testing.assert_close(layer.values.grad.double(), to_values, rtol=1e-6, atol=1e-6)


def test_integer_factors_pass_gradients_to_x_alone():
    case = Layer(**SMALL, value_dtype="int8", dictionary_dtype="int8")
    layer, (S, D) = case.module(), case.stored()
    assert not list(layer.parameters())
    x = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    reference = x.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    (reference @ S @ D).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-10, atol=1e-10)
