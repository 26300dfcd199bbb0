"""Kernels are compiled for every architecture without a GPU; what was compiled is kept on disk."""

import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from cospadi.backends import kernel_cache as cache
from cospadi.backends.cuda import launches, nvrtc
from cospadi.backends.cuda.nvrtc import Compiled, KernelError
from cospadi.errors import UnavailableError

ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
KERNELS = Path(nvrtc.__file__).with_name("kernels.cu")
VERBOSE = "--ptxas-options=-v"

REGISTERS = 65536
"""Of a multiprocessor, into which the largest block of a kernel must fit."""
MOST_REGISTERS = 255
"""That a thread can have."""
LEAST_SHARED = 99 * 1024
"""Bytes of shared memory that a block can have on the architectures that have least of it (sm_86, sm_89, sm_120)."""

PLAIN = """
extern "C" __global__ void scale(float* y, float factor) { y[threadIdx.x] *= factor; }
"""
GREEDY = """
extern "C" __global__ void plain(float* y) {
    __shared__ float s[24];
    s[threadIdx.x % 24] = y[1];
    __syncthreads();
    y[threadIdx.x] = s[0];
}
extern "C" __global__ void spills(float* y, const float* x) {
    float a[48];
    for (int j = 0; j < 48; j++) a[j] = x[threadIdx.x * 48 + j];
    for (int r = 0; r < 8; r++) {
        for (int j = 0; j < 48; j++) a[j] = a[j] * a[(j * 7 + 3) % 48] + x[r];
        __syncthreads();
    }
    float sum = 0;
    for (int j = 0; j < 48; j++) sum += a[j] * x[j];
    y[threadIdx.x] = sum;
}
extern "C" __global__ void indexes(float* y, const int* x) {
    float a[48];
    for (int j = 0; j < 48; j++) a[j] = j * y[j];
    for (int j = 0; j < 9; j++) a[x[j]] += 1;
    y[threadIdx.x] = a[x[threadIdx.x]];
}
"""


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of one kernel."""

    registers: int
    stack: int
    spilled: int
    shared: int


def resources(log):
    """Read the report of ``VERBOSE`` by kernel; a report of another form is an error and no clean bill."""
    found = {}
    parts = re.split(r"Compiling entry function '(\w+)' for 'sm_\w+'", log)
    for name, report in zip(parts[1::2], parts[2::2], strict=True):
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.findall(r"Used (\d+) registers", report)
        assert frames, report
        assert len(registers) == 1, report
        numbers = [tuple(map(int, frame)) for frame in frames]
        stack, spilled = max(n[0] for n in numbers), max(n[1] + n[2] for n in numbers)
        shared = re.search(r"(\d+) bytes smem", report)
        found[name] = Resources(int(registers[0]), stack, spilled, int(shared[1]) if shared else 0)
    assert found, f"no kernel in the log: {log}"
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiler():
    """NVRTC, which CI must have."""
    state = nvrtc.availability()
    if not state:
        if os.environ.get("CI"):
            pytest.fail(state.reason)
        pytest.skip(state.reason)


@pytest.fixture(scope="module")
def compiled_kernels():
    """The kernels for every architecture by its name, compiled side by side."""
    source = KERNELS.read_text(encoding="utf-8")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [pool.submit(nvrtc.compile_afresh, source, name, ("-std=c++17", VERBOSE)) for name in ARCHITECTURES]
        return {name: one.result() for name, one in zip(ARCHITECTURES, made, strict=True)}


def most_threads(name):
    """How large the blocks are that ``launches`` starts."""
    kind, *_, tokens = name.split("_")
    return launches.WARP * launches.COMBINE_TOKENS[int(tokens)][1] if kind == "combine" else 512


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile_without_remarks_or_spills_and_within_their_registers(architecture, request):
    compiled = request.getfixturevalue("compiled_kernels")[architecture]  # after the check that there is a compiler
    assert compiled.cubin[:4] == b"\x7fELF"
    assert "warning" not in compiled.log
    found = resources(compiled.log)
    assert set(found) == set(launches.kernels())
    for name, used in found.items():
        assert (used.stack, used.spilled) == (0, 0), f"{name} uses local memory: {used}"
        assert used.registers <= min(REGISTERS // most_threads(name), MOST_REGISTERS), f"{name}: {used}"
        if name in launches.kernels_with_much_shared_memory():
            assert used.shared + launches.SHARED_LIMIT <= LEAST_SHARED, f"{name}: {used}"


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("architecture", [ARCHITECTURES[0], ARCHITECTURES[-1]])
def test_spills_and_local_arrays_are_found(architecture):
    found = resources(nvrtc.compile_afresh(GREEDY, architecture, (VERBOSE, "--maxrregcount=32")).log)
    assert set(found) == {"plain", "spills", "indexes"}
    assert found["spills"].spilled > 0
    assert found["indexes"].spilled == 0
    assert found["indexes"].stack >= 48 * 4
    assert (found["plain"].spilled, found["plain"].stack, found["plain"].shared) == (0, 0, 96)
    assert found["spills"].shared == 0
    assert 0 < found["plain"].registers < found["spills"].registers <= 32


@pytest.mark.usefixtures("compiler")
def test_what_compiles_is_kept_and_an_error_says_what_and_where(own_cache):
    first = nvrtc.compile_cubin(PLAIN, "sm_90", ("-std=c++17",))
    assert first.cubin[:4] == b"\x7fELF"
    assert len(list(own_cache.iterdir())) == 1
    assert nvrtc.compile_cubin(PLAIN, "sm_90", ("-std=c++17",)) == Compiled(first.cubin, "")
    lines = "\n".join(f"int wrong_{i} = missing_{i};" for i in range(60))
    with pytest.raises(KernelError) as raised:
        nvrtc.compile_cubin(lines, "sm_90")
    text = str(raised.value)
    for word in ("compiling for sm_90", "NVRTC_ERROR_COMPILATION", "kernels.cu(1): error", "missing_0", "more lines"):
        assert word in text
    assert "missing_59" not in text
    with pytest.raises(KernelError, match="no-such-option"):
        nvrtc.compile_cubin(PLAIN, "sm_90", ("--no-such-option",))


@pytest.mark.usefixtures("compiler")
def test_a_gpu_gets_the_newest_architecture_that_it_runs(monkeypatch):
    known = nvrtc.architectures()
    assert {int(name[3:]) for name in ARCHITECTURES} <= set(known)
    for name in ARCHITECTURES:
        assert nvrtc.architecture_for(divmod(int(name[3:]), 10)) == name
    monkeypatch.setattr(nvrtc, "architectures", lambda: (75, 80, 86, 90, 100))
    assert nvrtc.architecture_for((8, 9)) == "sm_86"
    assert nvrtc.architecture_for((10, 3)) == "sm_100"
    for capability in ((12, 0), (7, 0)):
        with pytest.raises(UnavailableError, match=f"compute capability {capability[0]}.{capability[1]}"):
            nvrtc.architecture_for(capability)


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    nvrtc._library.cache_clear()
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libnvrtc.so.does-not-exist"]))
    try:
        assert "pip install nvidia-cuda-nvrtc" in nvrtc.availability().reason
        with pytest.raises(UnavailableError, match="pip install nvidia-cuda-nvrtc"):
            nvrtc.compile_cubin(PLAIN, "sm_90")
    finally:
        nvrtc._library.cache_clear()


@pytest.mark.parametrize(("of_torch", "first"), [("12.8", 12), ("13.0", 13), (None, 13)])
def test_the_nvrtc_of_torchs_cuda_is_taken_first(monkeypatch, of_torch, first):
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    assert [nvrtc._wanted_majors()[0], len(nvrtc._wanted_majors())] == [first, 2]


@pytest.fixture
def compilations(monkeypatch):
    """A compiler that counts its work, so that the cache can be tested without NVRTC."""
    done = []

    def compile_afresh(source, architecture, options=()):
        done.append((source, architecture, options))
        return Compiled(f"{architecture} {len(done)}".encode() * 100, "said")

    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile_afresh", compile_afresh)
    return done


def test_whatever_changes_the_code_changes_the_key(compilations, monkeypatch):
    cases = [("a", "sm_80", ()), ("a", "sm_90", ()), ("b", "sm_80", ()), ("a", "sm_80", ("-x",))]
    cases += [("a", "sm_80", ("-x", "-y")), ("a", "sm_80", ("-x-y",)), ("a-x", "sm_80", ())]
    cubins = [nvrtc.compile_cubin(*case).cubin for case in cases]
    assert len(set(cubins)) == len(compilations) == len(cases)
    assert [nvrtc.compile_cubin(*case).cubin for case in cases] == cubins
    assert len(compilations) == len(cases)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    assert nvrtc.compile_cubin(*cases[0]).log == "said"
    assert len(compilations) == len(cases) + 1


@pytest.mark.parametrize("damage", ["empty", "cut", "byte", "longer"])
def test_a_damaged_entry_is_compiled_again_and_mended(compilations, own_cache, caplog, damage):
    caplog.set_level(logging.INFO)
    nvrtc.compile_cubin(PLAIN, "sm_90")
    (file,) = own_cache.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "empty": b"",
            "cut": whole[:-1],
            "byte": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "longer": whole + b"\0",
        }[damage]
    )
    assert nvrtc.compile_cubin(PLAIN, "sm_90").cubin == b"sm_90 2" * 100
    assert "is damaged" in caplog.text
    assert nvrtc.compile_cubin(PLAIN, "sm_90").cubin == b"sm_90 2" * 100
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_written_is_no_error(compilations, own_cache, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)

    def refuse(*names):
        raise PermissionError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        nvrtc.compile_cubin(PLAIN, "sm_90")
    assert list(own_cache.iterdir()) == []
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("COSPADI_CACHE", str(tmp_path / "file"))
    for count in (2, 3):
        assert nvrtc.compile_cubin(PLAIN, "sm_90").cubin == f"sm_90 {count}".encode() * 100
    assert "are not cached" in caplog.text
    assert all(record.levelno == logging.INFO for record in caplog.records if record.name == cache.logger.name)


def test_processes_that_write_the_same_entry_never_show_half_of_it(own_cache):
    code = (
        "import sys\n"
        "from cospadi.backends import kernel_cache as cache\n"
        "for i in range(40): cache.write('key', sys.argv[1].encode() * 200_000)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        data = cache.read("key")
        if data is not None:
            assert data in (b"a" * 200_000, b"b" * 200_000)
            seen.add(data)
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen
    assert [file.name for file in own_cache.iterdir()] == ["key.bin"]
