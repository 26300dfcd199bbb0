"""Every backend against the product in float64."""

import itertools

import pytest
import torch

from cospadi.backends.auto import choose
from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.torch_sparse import SparseRows, TorchBackend
from cospadi.errors import UsageError
from cospadi.formats.base import FORMATS

# Of one dtype's rounding unit, times a small factor for the sums of two products of this size.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
CPU = torch.device("cpu")
DTYPES = sorted(TOLERANCE, key=str)


# Name and options; the device follows from the name, and what is not supported is skipped with the reason.
BACKEND_CASES = [(name, {}) for name in BACKENDS.names()] + [
    ("torch", {"coefficients": kind}) for kind in ("sparse", "dense")
]


def example(density=0.3, n_atoms=19, in_features=11, out_features=23, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(n_atoms, in_features, generator=generator)
    coefficients = torch.randn(n_atoms, out_features, generator=generator)
    coefficients[torch.rand(coefficients.shape, generator=generator) >= density] = 0
    return dictionary, coefficients


def inputs(shape, dtype, device, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def place(backend, dtype, packed):
    """Where to try a backend, or skip with the reason."""
    state = backend.availability()
    if not state:
        pytest.skip(state.reason)
    device = torch.device("cuda") if backend.name in ("cuda", "cupy") else CPU
    placement = Placement(device, dtype)
    state = backend.supports(packed, placement)
    if not state:
        pytest.skip(state.reason)
    return placement


def relative(found, expected):
    norm = expected.norm()
    return float((found.double().cpu() - expected).norm() / (norm if norm else 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", ["bitmask", "csr", "dense"])
@pytest.mark.parametrize(("name", "options"), BACKEND_CASES, ids=str)
def test_the_product_is_right_for_any_support_and_number_of_tokens(name, options, format, dtype):
    backend = BACKENDS.create(name, options)
    for density, n_tokens in itertools.product((0.0, 0.1, 0.5, 1.0), (0, 1, 2, 7, 17, 64)):
        dictionary, coefficients = example(density)
        packed = FORMATS.create(format).pack(coefficients, "float32")
        placement = place(backend, dtype, packed)
        d = backend.prepare_dictionary(dictionary, placement)
        c = backend.prepare_coefficients(packed, placement)
        x = inputs((n_tokens, 11), dtype, placement.device)
        before = x.clone()
        z = backend.project(d, x)
        z_before = z.clone()
        y = backend.combine(c, z)
        assert (y.shape, y.dtype) == ((n_tokens, 23), dtype)
        assert relative(y, x.double().cpu() @ dictionary.T.double() @ coefficients.double()) < TOLERANCE[dtype]
        assert torch.equal(x, before)
        assert torch.equal(z, z_before)


@pytest.mark.parametrize(("name", "options"), BACKEND_CASES, ids=str)
def test_strided_and_three_dimensional_inputs(name, options):
    backend = BACKENDS.create(name, options)
    dictionary, coefficients = example()
    packed = FORMATS.create("bitmask").pack(coefficients, "float32")
    placement = place(backend, torch.float32, packed)
    d, c = backend.prepare_dictionary(dictionary, placement), backend.prepare_coefficients(packed, placement)
    base = inputs((4, 22, 6), torch.float32, placement.device)
    for x in (base.transpose(1, 2)[..., ::2], base.transpose(1, 2)[0, :, 11:], base[:, :11, 0]):
        assert not x.is_contiguous()
        y = backend.combine(c, backend.project(d, x))
        expected = x.double().cpu() @ dictionary.T.double() @ coefficients.double()
        assert y.shape == expected.shape
        assert relative(y, expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("name", "options"), BACKEND_CASES, ids=str)
def test_gradients_reach_the_input(name, options):
    backend = BACKENDS.create(name, options)
    dictionary, coefficients = example()
    packed = FORMATS.create("bitmask").pack(coefficients, "float32")
    placement = place(backend, torch.float64, packed)
    d, c = backend.prepare_dictionary(dictionary, placement), backend.prepare_coefficients(packed, placement)
    x = inputs((3, 11), torch.float64, placement.device).requires_grad_()
    weights = inputs((3, 23), torch.float64, placement.device, seed=2)
    (backend.combine(c, backend.project(d, x)) * weights).sum().backward()
    expected = weights.cpu() @ coefficients.double().T @ dictionary.double()
    assert relative(x.grad, expected) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("value_dtype", ["bfloat14", "float16"])
def test_sixteen_bit_checkpoints_run_in_any_dtype(value_dtype):
    dictionary, coefficients = example()
    packed = FORMATS.create("bitmask").pack(coefficients, value_dtype)
    stored = FORMATS.create("bitmask").unpack(packed).double()
    backend = BACKENDS.create("auto")
    for dtype in DTYPES:
        placement = Placement(CPU, dtype)
        d = backend.prepare_dictionary(dictionary.bfloat16(), placement)
        c = backend.prepare_coefficients(packed, placement)
        x = inputs((5, 11), dtype, CPU)
        expected = x.double() @ dictionary.bfloat16().double().T @ stored
        assert relative(backend.combine(c, backend.project(d, x)), expected) < TOLERANCE[dtype]


def test_the_torch_backend_chooses_compressed_rows_by_density_and_dtype():
    def kind(density, dtype):
        packed = FORMATS.create("bitmask").pack(example(density)[1], "float32")
        return type(TorchBackend().prepare_coefficients(packed, Placement(CPU, dtype)))

    assert kind(0.05, torch.float32) is SparseRows
    assert kind(0.05, torch.bfloat16) is torch.Tensor
    assert kind(0.5, torch.float32) is torch.Tensor


def test_compressed_rows_say_where_they_do_not_work():
    packed = FORMATS.create("bitmask").pack(example()[1], "float32")
    state = TorchBackend(coefficients="sparse").supports(packed, Placement(CPU, torch.bfloat16))
    assert not state
    assert "float32 and float64 only" in state.reason


def test_compressed_rows_can_be_compiled():
    backend = TorchBackend(coefficients="sparse")
    dictionary, coefficients = example()
    placement = Placement(CPU, torch.float32)
    packed = FORMATS.create("bitmask").pack(coefficients, "float32")
    d, c = backend.prepare_dictionary(dictionary, placement), backend.prepare_coefficients(packed, placement)
    compiled = torch.compile(lambda x: backend.combine(c, backend.project(d, x)), backend="aot_eager", fullgraph=True)
    x = inputs((4, 11), torch.float32, CPU)
    torch.testing.assert_close(compiled(x), backend.combine(c, backend.project(d, x)))


@pytest.mark.parametrize("name", BACKENDS.names())
def test_inputs_that_are_not_floating_are_refused_with_a_reason(name):
    packed = FORMATS.create("bitmask").pack(example()[1], "float32")
    state = BACKENDS.create(name).supports(packed, Placement(CPU, torch.int8))
    assert not state
    assert state.reason


def test_auto_chooses_by_device():
    assert choose(torch.device("cuda:1"), torch.bfloat16)[0] == "cuda"
    assert choose(CPU, torch.bfloat16)[0] == "torch"
    assert choose(torch.device("mps"), torch.float16)[0] == "reference"


def test_gpu_backends_say_why_they_cannot_run_without_one():
    for name in ("cuda", "cupy"):
        state = BACKENDS.availability(name)
        assert state.ok or "GPU" in state.reason
        packed = FORMATS.create("bitmask").pack(example()[1], "float32")
        assert "cpu" in BACKENDS.create(name).supports(packed, Placement(CPU, torch.float32)).reason


def test_an_unknown_backend_or_option_is_a_usage_error():
    with pytest.raises(UsageError, match="did you mean 'torch'"):
        BACKENDS.create("torhc")
    with pytest.raises(UsageError, match="coefficients"):
        BACKENDS.create("torch", {"coefficients": "thin"})
