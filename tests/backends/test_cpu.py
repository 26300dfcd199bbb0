"""What is special in the kernels of the cpu backend: memory, rounding, infinities, the compiler and threads."""

import ctypes
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from cospadi.backends.auto import choose
from cospadi.backends.base import BACKENDS, Placement
from cospadi.backends.cpu import library
from cospadi.backends.cpu.runtime import CpuBackend, dense_bf16
from cospadi.errors import CospadiError, UnavailableError
from cospadi.formats.base import FORMATS, PackedCoefficients, PackedDictionary
from tests.backends.backend_cases import CPU, Case, Prepared, check, check_product, poisoned_memory

pytestmark = pytest.mark.skipif(
    not BACKENDS.availability("cpu"), reason=BACKENDS.availability("cpu").reason or "the kernels are there"
)
ROOT = Path(__file__).parents[2]
ALWAYS, NEVER = 10**6, 0  # tokens up to which the kernels are taken
NAN, INF = float("nan"), float("inf")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(params=["avx512", "avx2", "neon", "portable"])
def level(request):
    if request.param not in library.levels():
        pytest.skip(f"this machine has no {request.param} kernels")
    return request.param


def multiply(level, D, S, x, max_tokens=ALWAYS):
    """Multiply x (n_tokens, in_features) by D (in_features, n_atoms) and S (n_atoms, out_features), stored as given."""
    backend, placement = CpuBackend(max_tokens, level), Placement(CPU, x.dtype)
    mask = FORMATS.create("bitmask").pack(torch.ones(S.shape), "float32").tensors["mask"]
    value_dtype = str(S.dtype).removeprefix("torch.")
    tensors = {"mask": mask, "values": S.T.reshape(-1).contiguous()}
    packed = PackedCoefficients("bitmask", *S.shape, value_dtype, tensors)
    d = backend.prepare_dictionary(PackedDictionary(D.T.contiguous()), placement)
    return backend.multiply(d, backend.prepare_coefficients([packed], placement), x, None)


def one(dtype):
    return torch.ones(1, 1, dtype=dtype)


# Memory


def run_checks(build, faults, **environment):
    command = [sys.executable, "-m", "tests.backends.kernel_checks", build, faults]
    # Threads that wait must not take the core from those that work, where there are few cores.
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.slow
def test_no_load_leaves_the_stored_tensors():
    done = run_checks("plain", "sound")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "are right" in done.stdout


def test_a_load_that_leaves_them_would_be_seen():
    done = run_checks("plain", "planted")
    assert done.returncode == -11, done.stderr[-2000:]


def test_tensors_that_are_not_in_the_memory_of_the_cpu_are_not_read():
    """As when a layer was left on another device, or a tool keeps the weights elsewhere between calls."""
    case = Case(widths=(37, 5))
    for name in ("dictionary", "values", "mask"):
        layers = case.modules("cpu")
        moved = getattr(layers["m0"], name).to("meta")
        setattr(layers["m0"], name, moved if name == "mask" else nn.Parameter(moved, requires_grad=False))
        with torch.no_grad(), pytest.raises(RuntimeError, match="meta"):
            layers["m1"](case.x())


@pytest.fixture(scope="module")
def sanitizers(tmp_path_factory):
    """The environment in which kernels are compiled with, and run under, the address and undefined sanitizers."""
    found = []
    for name in ("libasan.so", "libubsan.so"):
        told = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=False).stdout
        if not Path(told.strip()).is_absolute():
            pytest.skip(f"gcc has no {name} here")
        found.append(told.strip())
    return {
        "CC": "gcc -fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "COSPADI_CACHE": str(tmp_path_factory.mktemp("sanitized")),
    }


@pytest.mark.slow
def test_the_sanitizers_find_nothing(sanitizers):
    done = run_checks("sanitized", "sound", **sanitizers)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "are right" in done.stdout


@pytest.mark.slow
def test_the_sanitizers_would_find_a_load_beyond_a_tensor(sanitizers):
    done = run_checks("sanitized", "planted", **sanitizers)
    assert done.returncode not in (0, -11)
    assert "AddressSanitizer" in done.stderr


def test_the_stored_tensors_are_not_copied():
    case = Case(n_atoms=640, in_features=320, widths=(200, 60), dtype=BF16)
    for value_dtype in ("bfloat16", "float32", "int8"):
        case = replace(case, value_dtype=value_dtype)
        stored, members, placement = case.dictionary(), case.members(), Placement(CPU, BF16)
        backend = CpuBackend()
        d, c = backend.prepare_dictionary(stored, placement), backend.prepare_coefficients(members, placement)
        assert d.struct.values == stored.values.data_ptr()
        own = {stored.values.data_ptr()}
        for struct, packed in zip(c.structs, members, strict=True):
            assert struct.mask == packed.tensors["mask"].data_ptr()
            assert struct.values == packed.tensors["values"].data_ptr()
            own |= {tensor.data_ptr() for tensor in packed.tensors.values()}
        extra = sum(t.nbytes for t in c.kept if t.data_ptr() not in own)
        columns = sum(case.widths)
        assert extra <= 8 * (columns + 2) + 2 * 4096, "a pointer per column and copies of the last columns"


# Rounding


def samples_of(dtype):
    """Float32 numbers on and around the numbers of a 16-bit dtype and the ties between them; finite."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    numbers = patterns[patterns.isfinite()].unique()
    ties = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()
    last = numbers[-1:] + (numbers[-1:] - numbers[-2:-1]) / 2  # from here on infinity, where float32 goes that far
    found = torch.cat([numbers, ties, last, -last])
    up, down = torch.nextafter(found, torch.tensor(INF)), torch.nextafter(found, torch.tensor(-INF))
    found = torch.cat([found, up, down])
    return found[found.isfinite()]


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("most", [ALWAYS, NEVER], ids=["kernel", "densified"])
def test_sixteen_bit_outputs_are_rounded_as_torch_does(level, dtype, most):
    values = samples_of(dtype)
    if dtype == BF16 and most == NEVER:
        # The instruction that rounds to bfloat16 takes subnormal numbers for zero, and so do torch's products.
        values = values[values.abs() >= torch.finfo(F32).tiny]
    y = multiply(level, one(F32), values.unsqueeze(0), one(dtype), most)
    assert len(values) > 10**5
    assert torch.equal(y[0], values.to(dtype))  # the signs of zeros apart: sums begin with +0
    assert bool(y.isinf().any())


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_sixteen_bit_inputs_pass_unchanged(level, dtype):
    """Every one of the 65536 patterns, as x, as a value of S and as a number of D."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    for stored in (F32, dtype):
        expected = x
        if level == "avx512" and dtype == stored == BF16:
            # Products of pairs take subnormal numbers for zero.
            expected = torch.where(x.abs() < torch.finfo(BF16).tiny, torch.zeros_like(x), x)
        y = multiply(level, one(stored), one(stored), x.unsqueeze(1))[:, 0]
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        finite, wanted = x[x.isfinite()], expected[x.isfinite()]
        assert torch.equal(multiply(level, one(stored), finite.unsqueeze(0).to(stored), one(dtype))[0], wanted)
    for chunk in x[x.isfinite()].split(1000):
        # D is read in rows: a token picks each of its numbers.
        y = multiply(level, chunk.unsqueeze(1), one(dtype), torch.eye(len(chunk)))
        assert torch.equal(y[:, 0], chunk.float())


def test_eight_bit_factors_bear_an_outlier(level):
    """x and z become 16-bit integers in some kernels: each row changes by at most sqrt(n) / 65534 of its norm."""
    case = Case(4, 200, 300, (90,), value_dtype="int8", dtype=F16)
    D, S = case.stored()
    prepared, x = Prepared(case, "cpu", {"instructions": level, "max_tokens": ALWAYS}), case.x() / 64
    x[1, 17], x[2, 299], x[3, 0] = 200.0, -3.0, 1e-3
    z = x.double() @ D
    of_z = 300**0.5 / 65534 * x.double().norm(dim=1, keepdim=True) * torch.linalg.matrix_norm(D, 2)
    of_z = of_z + 200**0.5 / 65534 * (z.norm(dim=1, keepdim=True) + of_z)
    allowed = of_z * S.norm(dim=0) + 2**-11 * (z @ S).abs()
    assert bool(((prepared(x).double() - z @ S).abs() <= 1.01 * allowed + 1e-7).all())


@pytest.mark.parametrize("scale", [1e-30, 1e-36, 1e-39])
def test_tiny_inputs_do_not_blow_up(level, scale):
    for value_dtype in ("bfloat16", "int8"):
        case = Case(4, dtype=BF16, value_dtype=value_dtype)
        D, S = case.stored()
        x = (case.x() * scale).to(BF16)
        y = Prepared(case, "cpu", {"instructions": level, "max_tokens": ALWAYS})(x)
        expected = x.double() @ D @ S
        # What is as good as zero may be taken for zero, but not for anything else.
        assert float((y.double() - expected).norm()) <= 1.01 * float(expected.norm())


# Infinities


@pytest.mark.parametrize(
    ("dtype", "value_dtype"), [(BF16, "bfloat16"), (F16, "float32"), (F32, "bfloat16"), (BF16, "int8"), (F32, "int8")]
)
def test_infinities_and_nan_stay_in_their_token(level, dtype, value_dtype):
    case = Case(8, 70, 45, (37, 5), density=1.0, dtype=dtype, value_dtype=value_dtype)
    D, S = case.stored()
    prepared, x = Prepared(case, "cpu", {"instructions": level, "max_tokens": ALWAYS}), case.x()
    clean = prepared(x)
    for n_tokens in (1, 8):
        for value, place in ((NAN, 0), (NAN, 44), (INF, 7), (-INF, 32), (NAN, 31)):
            token = n_tokens // 2
            spoilt = x[:n_tokens].clone()
            before = prepared(spoilt)
            spoilt[token, place] = value
            y = prepared(spoilt)
            others = [t for t in range(n_tokens) if t != token]
            assert torch.equal(y[others], before[others])
            assert not bool(y[token].isfinite().any()), f"{value} at {place}: {y[token][y[token].isfinite()][:3]}"
            if value_dtype != "int8":
                expected = spoilt[token].double() @ D @ S
                assert torch.equal(y[token].isnan(), expected.isnan())
                assert torch.equal(y[token][~expected.isnan()].double(), expected[~expected.isnan()])
    assert bool(clean.isfinite().all())


def test_sums_that_overflow_become_infinite(level):
    y = multiply(level, one(F32), torch.tensor([[65520.0, 65519.0, -1e30, 3e38]]), one(F16))
    assert y.tolist() == [[INF, 65504.0, -INF, INF]]


@pytest.mark.parametrize("n_tokens", [1, 3, 8, 17])
def test_the_dense_yardstick_is_right(n_tokens):
    """The benchmarks compare with it."""
    if "avx512" not in library.levels():
        pytest.skip("this machine has no avx512 kernels")
    for out_features, in_features in ((1, 1), (64, 64), (131, 70)):
        case = Case(n_tokens, out_features, in_features, (1,), dtype=BF16, value_dtype="bfloat16")
        weight, x = case.dictionary().values, case.x()
        with poisoned_memory():
            y = dense_bf16(weight, x)
        assert (y.shape, y.dtype) == ((n_tokens, out_features), BF16)
        check_product(x, weight.T.double(), torch.eye(out_features, dtype=torch.float64), y)


# The compiler and the cache


@pytest.fixture
def compilations(monkeypatch, tmp_path):
    """Load the plain kernels anew, quickly compiled, with an empty cache; counts the compilations."""
    calls = []
    compile_ = library._compile
    monkeypatch.setattr(library, "_compile", lambda *a: calls.append(a) or compile_(*a))
    monkeypatch.setattr(library, "_OF_MACHINE", {})
    monkeypatch.setattr(library, "_FLAGS", ("-O0", "-std=gnu11", "-fPIC"))
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield calls
    monkeypatch.undo()
    library.load.cache_clear()


def reload():
    library.load.cache_clear()
    return library.levels()


def test_kernels_are_compiled_once_and_again_when_the_cache_is_damaged(compilations, tmp_path):
    assert reload() == ["portable"]
    assert len(compilations) == 1
    (entry,) = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert reload() == ["portable"]
    assert len(compilations) == 1
    whole = entry.read_bytes()
    entry.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    assert reload() == ["portable"]
    assert len(compilations) == 2
    assert len(entry.read_bytes()) == len(whole)


def test_a_cache_that_cannot_be_written_is_done_without(compilations, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "file"))
    assert reload() == ["portable"]
    assert reload() == ["portable"]
    assert len(compilations) == 2


@pytest.mark.parametrize(("fails", "words"), [(False, ("torch", "is not found")), (True, ("I do not like it",))])
def test_no_compiler_or_one_that_fails_is_told_in_one_line(compilations, monkeypatch, tmp_path, fails, words):
    compiler = tmp_path / "cc"
    if fails:
        compiler.write_text("#!/bin/sh\necho 'kernels.c:1: error: I do not like it' >&2\necho more >&2\nexit 1\n")
        compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -O2")
    library.load.cache_clear()
    state, case = CpuBackend.availability(), Case()
    assert not state
    assert "\n" not in state.reason
    assert all(word in state.reason for word in (str(compiler), *words))
    assert CpuBackend().supports(case.members()[0], Placement(CPU, F32)).reason == state.reason
    with pytest.raises(CospadiError, match=words[-1]):
        library.load()
    with pytest.raises(UnavailableError, match="backend 'cpu' cannot run"):
        next(iter(case.modules("cpu").values()))(case.x())


def test_auto_falls_back_where_there_is_no_compiler(compilations, monkeypatch):
    monkeypatch.setenv("CC", "/nonexistent/cc")
    library.load.cache_clear()
    choose.cache_clear()
    case = Case(widths=(37,))
    check(case, case.modules("auto")["m0"](case.x()))
    name, reason = choose(CPU, F32)
    choose.cache_clear()
    assert name == "torch"
    assert "/nonexistent/cc" in reason
    assert not compilations


def test_instruction_sets_that_the_machine_lacks_are_refused():
    missing = next(name for name in library.LEVELS if name not in library.levels())
    state = CpuBackend(instructions=missing).supports(Case().members()[0], Placement(CPU, F32))
    assert not state
    assert missing in state.reason
    assert "portable" in state.reason


# Threads


def test_calls_at_the_same_time_give_the_same_bits():
    """One prepared layer, several threads of Python, each with threads of torch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for value_dtype in ("bfloat16", "int8"):
            case = Case(40, 400, 300, (200, 131), dtype=BF16, value_dtype=value_dtype)
            prepared = Prepared(case, "cpu", {"max_tokens": ALWAYS})
            parts = case.x().split([1, 2, 5, 8, 24])
            call = functools.partial(prepared.backend.multiply, prepared.dictionary, prepared.coefficients, member=None)
            expected = [call(x) for x in parts]
            with ThreadPoolExecutor(4) as pool:
                for found, x in zip(pool.map(call, parts * 8), expected * 8, strict=True):
                    assert torch.equal(found, x)
    finally:
        torch.set_num_threads(threads)


def test_structures_have_the_sizes_that_c_gives_them():
    """Fields of 8 bytes each, so that no compiler pads them."""
    for struct in (library.Dictionary, library.Coefficients):
        assert ctypes.sizeof(struct) == 8 * len(struct._fields_)
