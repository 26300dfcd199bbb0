"""Random layers for the tests of the backends, their products in float64, and how far a backend may be from them."""

import functools
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.sparse_linear import build_group
from cospadi.formats.base import FORMATS
from cospadi.formats.dictionary import DICTIONARY_DTYPES, dictionary_dtype_of, pack_dictionary, unpack_dictionary
from cospadi.formats.factorization import SparseFactorization
from cospadi.formats.packing import pack_group

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FORMAT_NAMES = ("bitmask", "csr", "dense")
STORED = [(format, dtype) for format in FORMAT_NAMES for dtype in FORMATS.create(format).value_dtypes]
STORED_DICTIONARIES = [name for name in DICTIONARY_DTYPES if name != "none"]
TOKENS = (1, 7, 8, 17, 65)

# What a dtype may change of a number.  In float32 and float64, where the sums of some hundred terms are rounded too,
# some dozen times as much.
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20, torch.float64: 2**-49}

# Every registered backend as it is, then the options that choose another path.  What a machine lacks is skipped.
BACKEND_CASES = [
    *((name, {}) for name in BACKENDS.names()),
    *(("torch", {"coefficients": kind}) for kind in ("sparse", "dense")),
    *(
        ("cpu", {"instructions": level, "max_tokens": most})
        for level in ("avx512", "avx2", "neon", "portable")
        for most in (10**6, 0)
    ),
]

# Without ``auto``, which runs one of the others, and with one instruction set that writes S out.
DISTINCT_CASES = [case for case in BACKEND_CASES if case != ("auto", {}) and case[1].get("max_tokens") != 0]
DISTINCT_CASES.append(("cpu", {"instructions": "portable", "max_tokens": 0}))

GPU_BACKENDS = ("cuda", "cupy")


def parameters(cases):
    """Give cases to ``pytest.mark.parametrize``, with readable names, those on a GPU marked."""
    return [
        pytest.param(
            name,
            options,
            id="-".join([name, *map(str, options.values())]),
            marks=[pytest.mark.gpu] if name in GPU_BACKENDS else [],
        )
        for name, options in cases
    ]


def device_of(name):
    """Name the device on which a backend is tried; skips GPU backends where there is none, with their reason."""
    state = BACKENDS.availability(name)
    if not state:
        pytest.skip(state.reason)
    return torch.device("cuda") if name in GPU_BACKENDS else CPU


@functools.cache
def _refusals(name, options, device):
    backend, packed = BACKENDS.create(name, dict(options)), FORMATS.create("bitmask").pack(torch.ones(1, 1), "float32")
    return {dtype: backend.supports(packed, Placement(device, dtype)).reason for dtype in DTYPES}


def dtypes_of(name, options):
    """List the input dtypes that a backend runs; skips if there are none, with its reason."""
    refusals = _refusals(name, tuple(options.items()), device_of(name))
    found = [dtype for dtype, reason in refusals.items() if not reason]
    if not found:
        pytest.skip(next(iter(refusals.values())))
    return found


def corners(name, options):
    """List pairs of input dtype and value dtype that a backend runs: each dtype once, and 8-bit values twice."""
    pairs = zip((*DTYPES, torch.bfloat16), ("bfloat16", "int8", "float32", "float32", "int8"), strict=True)
    return [pair for pair in pairs if pair[0] in dtypes_of(name, options)]


def input_shapes(case):
    """Inputs of every shape and memory order for a layer of 11 inputs, by their names."""
    base = replace(case, n_tokens=4 * 6 * 2).x().view(4, 22, 6)
    return {
        "three dimensions": base.transpose(1, 2)[..., ::2],
        "strided": base.transpose(1, 2)[0, :, 11:],
        "one dimension": base[0, :11, 0],
        "repeated": base[:1, :11, 0].expand(5, 11),
        "no tokens": base[:0, :11, 0],
        "no tokens in three dimensions": base.new_empty(2, 0, 11),
    }


@contextmanager
def poisoned_memory():
    """Let torch fill what it does not initialise with NaN or the largest integer: what a kernel leaves out is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS may warn that it needs a setting of its own
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """A group of layers and an input; everything follows from the fields."""

    n_tokens: int = 3
    n_atoms: int = 75
    in_features: int = 45
    widths: tuple[int, ...] = (37, 5)
    density: float | None = 0.5  # None: another one in every column
    dtype: torch.dtype = torch.float32
    format: str = "bitmask"
    value_dtype: str = "float32"
    dictionary_dtype: str | None = None  # None: that of checkpoints
    seed: int = 0

    def _numbers(self, stream, *shape):
        """Draw normal numbers of magnitude 0.1 and more: none rounds to zero, none is subnormal in float16."""
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(10 * self.seed + stream))
        return torch.where(drawn < 0, -1.0, 1.0) * (drawn.abs() + 0.1)

    def dictionary(self):
        values = self._numbers(0, self.in_features, self.n_atoms)
        return pack_dictionary(values, self.dictionary_dtype or dictionary_dtype_of(self.value_dtype))

    def coefficients(self):
        if self.format == "identity":
            return [torch.eye(self.n_atoms)]
        found = []
        for m, width in enumerate(self.widths):
            generator = torch.Generator().manual_seed(10 * self.seed + 5 + m)
            density = torch.rand(width, generator=generator) if self.density is None else self.density
            support = torch.rand(self.n_atoms, width, generator=generator) < density
            found.append(self._numbers(2 + m, self.n_atoms, width) * support)
        return found

    def members(self):
        return [FORMATS.create(self.format).pack(S, self.value_dtype) for S in self.coefficients()]

    def x(self):
        return self._numbers(1, self.n_tokens, self.in_features).to(self.dtype)

    def stored(self):
        """Give D (in_features, n_atoms) and S of all members side by side, as stored, in float64."""
        S = torch.cat([FORMATS.create(self.format).unpack(packed) for packed in self.members()], dim=1)
        return unpack_dictionary(self.dictionary()).T.double(), S.double()

    def modules(self, backend, options=None):
        """Build the layers as modules, by name, with a backend and its options."""
        names = [f"m{index}" for index in range(len(self.widths))]
        D = self._numbers(0, self.in_features, self.n_atoms)
        factors = SparseFactorization(D, dict(zip(names, self.coefficients(), strict=True)))
        spec, tensors = pack_group(factors, self.format, self.value_dtype, {}, True, self.dictionary_dtype)
        layers = build_group(spec, backend)
        for name, layer in layers.items():
            own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
            layer.load_state_dict(own)
        if options:
            next(iter(layers.values()))._bundle.backend = BACKENDS.create(backend, options)
        return layers


def quantised(width, dictionary_dtype, **fields):
    """A case of a layer that is only quantised, of so many outputs."""
    return Case(
        n_atoms=width,
        widths=(width,),
        format="identity",
        value_dtype="none",
        dictionary_dtype=dictionary_dtype,
        **fields,
    )


class Block(nn.Module):
    """Layers that receive the same input, side by side."""

    def __init__(self, case, backend="torch"):
        super().__init__()
        self.layers = nn.ModuleDict(case.modules(backend))

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers.values()], dim=-1)


class Prepared:
    """A case as a backend prepared it, or other factors of the same sizes."""

    def __init__(self, case, name, options=None, dictionary=None, members=None):
        self.case, self.backend = case, BACKENDS.create(name, dict(options or {}))
        placement = Placement(device_of(name), case.dtype)
        self.device, members = placement.device, members or case.members()
        for packed in members:
            state = self.backend.supports(packed, placement)
            assert state, state.reason
        self.dictionary = self.backend.prepare_dictionary(dictionary or case.dictionary(), placement)
        self.coefficients = self.backend.prepare_coefficients(members, placement)

    def __call__(self, x=None, member=None):
        """Multiply; the input must stay as it is, and the result must be new, whole and contiguous."""
        x = (self.case.x() if x is None else x).to(self.device)
        before = x.clone()
        with poisoned_memory(), torch.no_grad():
            y = self.backend.multiply(self.dictionary, self.coefficients, x, member)
        width = sum(self.case.widths) if member is None else self.case.widths[member]
        assert (y.shape, y.dtype, y.device) == ((x.shape[0], width), x.dtype, x.device)
        assert y.is_contiguous()
        assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))  # bits, since NaN equals nothing
        return y.cpu()


def check(case, y, member=None):
    """Compare with the product of the stored factors in float64."""
    D, S = case.stored()
    check_product(case.x(), D, S if member is None else S.split(case.widths, dim=1)[member], y)


def check_product(x, D, S, y):
    """Compare y, in the dtype of x, with x D S in float64.

    D, z, S and y may each be rounded to the dtype of x.  Such errors add up as the root of their squares; four times
    that holds for any three terms at their worst, and is ten standard deviations of many.
    """
    x = x.cpu()
    z = x.double() @ D
    expected = z @ S
    assert y.shape == expected.shape
    error = (y.cpu().double() - expected).abs()
    squares = x.double().square() @ D.square() @ S.square() + z.square() @ S.square() + expected.square()
    assert bool((error <= 4 * UNIT[x.dtype] * squares.sqrt()).all()), f"{error.max():g} off {expected.abs().max():g}"
