"""How kernels are loaded and started, against a driver library that records what it is given."""

import contextlib
import ctypes
import shutil
import struct
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.backends.cuda import driver as module
from cospadi.backends.cuda import nvrtc
from cospadi.backends.cuda.driver import Driver, DriverModule, load_module
from cospadi.backends.cuda.nvrtc import Compiled, KernelError
from cospadi.errors import UnavailableError
from cospadi.registry import Availability

# A kernel's name holds its parameters after the last underscore: P or i each.  That is what a real driver reads from
# the machine code, and the only way to know how many bytes of each argument to take.
FAKE = r"""
#include <stdint.h>
#include <string.h>

typedef struct { unsigned grid[3], block[3], shared; void *stream, *context, *extra; char name[64];
                 int n; uint64_t value[64]; } Launch;
Launch launched; int n_launches, n_loads, n_pushes, fail_with, attribute, attribute_value, largest_shared = 100000;
char image[16]; char names[8][64]; int n_names;
_Thread_local void *stack[8]; _Thread_local int depth;

int cuDeviceGet(int *device, int ordinal) { *device = ordinal + 100; return ordinal > 1 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)(intptr_t)(0x7f0000000000 + device);
                                                           return device < 100 ? 101 : 0; }
void become(void *context) { stack[depth = 0] = context; }
int depth_now(void) { return depth; }
int cuCtxGetCurrent(void **context) { *context = stack[depth]; return 0; }
int cuCtxPushCurrent_v2(void *context) { stack[++depth] = context; n_pushes++; return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = stack[depth--]; return 0; }
int cuModuleLoadData(void **handle, const char *data) {
    if (!stack[depth]) return 201;
    memcpy(image, data, 16); n_loads++; *handle = (void *)0x7fabcdef0123; return image[0] == 'B' ? 200 : 0; }
int cuModuleGetFunction(void **function, void *handle, const char *name) {
    if (handle != (void *)0x7fabcdef0123) return 400;
    if (!strncmp(name, "absent", 6)) return 500;
    strcpy(names[n_names], name); *function = names[n_names++]; return 0; }
int cuFuncSetAttribute(void *function, int which, int value) {
    attribute = which; attribute_value = value; return value > largest_shared ? 1 : 0; }
int cuLaunchKernel(const char *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **params, void *extra) {
    if (fail_with) { int code = fail_with; fail_with = 0; return code; }
    unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz};
    memcpy(launched.grid, grid, 12); memcpy(launched.block, block, 12);
    launched.shared = shared; launched.stream = stream; launched.context = stack[depth]; launched.extra = extra;
    strcpy(launched.name, function); launched.n = 0;
    for (const char *kind = strrchr(function, '_') + 1; *kind; kind++) {
        launched.value[launched.n] = 0;
        memcpy(&launched.value[launched.n], params[launched.n], *kind == 'P' ? 8 : 4);
        launched.n++;
    }
    n_launches++;
    return 0; }
int cuGetErrorName(int code, const char **text) {
    *text = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 200 ? "CUDA_ERROR_INVALID_IMAGE"
          : code == 500 ? "CUDA_ERROR_NOT_FOUND" : code == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : 0;
    return *text ? 0 : 1; }
int cuGetErrorString(int code, const char **text) {
    *text = code == 701 ? "too many resources requested for launch" : "as the driver puts it";
    return code == 999 ? 1 : 0; }
"""

STREAM = 0x7FEDCBA987654320
CONTEXT = 0x7F0000000000 + 100


class Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("n", ctypes.c_int),
        ("value", ctypes.c_uint64 * 64),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc, clang) to make the driver library that records its calls")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "fake.c").write_text(FAKE)
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(folder / "fake.so"), str(folder / "fake.c")]
    subprocess.run(command, check=True)
    return folder / "fake.so"


@pytest.fixture
def fake(built, tmp_path):
    """A library of its own for each test: the loader shares one that has the same path."""
    library = ctypes.CDLL(str(shutil.copy(built, tmp_path / "fake.so")))
    library.become.argtypes = [ctypes.c_void_p]
    library.become(CONTEXT)
    return library


def number(library, name):
    return ctypes.c_int.in_dll(library, name)


def launched(library):
    return Launch.in_dll(library, "launched")


def kernel_of(library, name):
    """A kernel that takes tensors of the CPU, whose index is -1: the fake only writes down where they are."""
    made = DriverModule(Driver(library), b"\x7fELF, not really", 0, lambda: STREAM).kernel(name)
    made._index = -1
    return made


def as_sent(value):
    """The bits that a parameter holds, as the lowest of 64."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if value is None:
        return 0
    return value % 2**32


def test_a_launch_arrives_as_it_was_given(fake):
    tensors = [torch.zeros(3), torch.zeros(2, dtype=torch.uint8), torch.nn.Parameter(torch.zeros(1))]
    args = (tensors[0], 7, tensors[1], None, -(2**31), 2**31 - 1, tensors[2], None)
    kernel_of(fake, "mixed_PiPPiiPP").launch((2**31 - 1, 65535, 3), (128, 2, 4), 99_000, args)
    found = launched(fake)
    assert (found.name, found.n) == (b"mixed_PiPPiiPP", len(args))
    assert (list(found.grid), list(found.block), found.shared) == ([2**31 - 1, 65535, 3], [128, 2, 4], 99_000)
    assert (found.stream, found.context, found.extra) == (STREAM, CONTEXT, None)
    assert list(found.value)[: found.n] == [as_sent(value) for value in args]
    assert tensors[0].data_ptr() > 2**32  # so that pointers cut to 32 bits would have been found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(-(2**31), 2**31 - 1),
            st.none(),
            st.integers(1, 5).map(lambda n: torch.zeros(n)),
        ),
        max_size=24,
    )
)
def test_any_arguments_arrive_exactly(built, args):
    library = ctypes.CDLL(str(built))
    library.become.argtypes = [ctypes.c_void_p]
    library.become(CONTEXT)
    number(library, "n_names").value = 0
    letters = "".join("i" if isinstance(a, int) else "P" for a in args)
    kernel = kernel_of(library, f"any_{letters}")
    for _ in range(2):  # the second time in memory that was used before
        kernel.launch((1, 1, 1), (32, 1, 1), 0, tuple(args))
        found = launched(library)
        assert found.n == len(args)
        assert list(found.value)[: found.n] == [as_sent(value) for value in args]


def test_threads_do_not_share_the_memory_of_their_arguments(fake):
    kernel, wrong = kernel_of(fake, "many_" + "i" * 16), []
    addresses = set()
    together = threading.Barrier(2)

    def work(base):
        fake.become(CONTEXT)
        args = tuple(range(base, base + 16))
        together.wait()
        for _ in range(200):
            memory = kernel._memory(tuple(map(type, args)))
            addresses.add(memory.fill(args, "many", -1))
            if tuple(struct.unpack_from("16i", memory._content)) != args:
                wrong.append(args)
        together.wait()  # nobody frees memory that the other would then get

    threads = [threading.Thread(target=work, args=(base,)) for base in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(addresses) == 2


@pytest.mark.parametrize("before", [None, 0x1234])
def test_a_thread_with_another_context_gets_it_back(fake, before):
    kernel = kernel_of(fake, "plain_")
    pushes = number(fake, "n_pushes")
    fake.become(CONTEXT)
    already = pushes.value
    kernel.launch((1, 1, 1), (1, 1, 1), 0, ())
    assert pushes.value == already  # nothing to do where the context is current
    fake.become(before)
    kernel.launch((1, 1, 1), (1, 1, 1), 0, ())
    assert launched(fake).context == CONTEXT
    current = ctypes.c_void_p()
    fake.cuCtxGetCurrent(ctypes.byref(current))
    assert (current.value, fake.depth_now()) == (before, 0)
    number(fake, "fail_with").value = 701
    with pytest.raises(KernelError, match="OUT_OF_RESOURCES"):
        kernel.launch((1, 1, 1), (1, 1, 1), 0, ())
    assert fake.depth_now() == 0


def test_a_failed_launch_names_kernel_error_and_sizes(fake):
    kernel = kernel_of(fake, "heavy_i")
    number(fake, "fail_with").value = 701
    with pytest.raises(KernelError) as raised:
        kernel.launch((4, 1, 1), (1024, 1, 1), 512, (1,))
    text = str(raised.value)
    for word in ("heavy_i", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources", "(4, 1, 1)", "512 bytes"):
        assert word in text
    number(fake, "fail_with").value = 999
    with pytest.raises(KernelError, match=r"heavy_i.*CUDA error 999"):
        kernel.launch((4, 1, 1), (1024, 1, 1), 512, (1,))


def test_loading_and_finding_name_what_failed(fake):
    library = Driver(fake)
    with pytest.raises(KernelError, match=r"loading the kernels: CUDA_ERROR_INVALID_IMAGE"):
        DriverModule(library, b"Bad image, 16 bytes", 0, lambda: 0)
    with pytest.raises(KernelError, match=r"absent_kernel: CUDA_ERROR_NOT_FOUND"):
        kernel_of(fake, "absent_kernel")
    with pytest.raises(KernelError, match=r"cuda:7: CUDA error 101"):
        DriverModule(library, b"\x7fELF, not really", 7, lambda: 0)


def test_shared_memory_is_asked_for(fake):
    kernel = kernel_of(fake, "wide_")
    kernel.allow_shared(99_000)
    header = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES in cuda.h
    assert (number(fake, "attribute").value, number(fake, "attribute_value").value) == (header, 99_000)
    with pytest.raises(KernelError, match=r"wide_ 200000 bytes.*CUDA_ERROR_INVALID_VALUE"):
        kernel.allow_shared(200_000)
    assert fake.depth_now() == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "bool is no tensor"),
        (0.5, "float is no tensor"),
        (np.int32(3), "int32 is no tensor"),
        ("x", "str is no tensor"),
        (2**31, "2147483648"),
        (-(2**31) - 1, "-2147483649"),
    ],
    ids=repr,
)
def test_arguments_that_do_not_fit_are_refused(fake, value, words):
    kernel = kernel_of(fake, "strict_iP")
    with pytest.raises(KernelError, match=f"strict_iP.*{words}"):
        kernel.launch((1, 1, 1), (1, 1, 1), 0, (value, None))
    kernel._index = 0
    with pytest.raises(KernelError, match="strict_iP, argument 1: the tensor is on cpu, not on cuda:0"):
        kernel.launch((1, 1, 1), (1, 1, 1), 0, (1, torch.zeros(1)))
    assert number(fake, "n_launches").value == 0


@pytest.fixture
def pretended_gpu(fake, monkeypatch):
    """torch says that there are GPUs of capability 9.0; NVRTC and driver are pretended."""
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=STREAM + index))
    monkeypatch.setattr(nvrtc, "availability", lambda: Availability(True))
    monkeypatch.setattr(nvrtc, "architecture_for", lambda capability: f"sm_{capability[0]}{capability[1]}")
    monkeypatch.setattr(
        nvrtc,
        "compile_cubin",
        lambda source, architecture, options: Compiled(
            f"{source} {architecture} {' '.join(options)}".encode().ljust(16), ""
        ),
    )
    monkeypatch.setattr(module, "open_driver", lambda: Driver(fake))
    module._load.cache_clear()
    yield fake
    module._load.cache_clear()


def test_a_source_is_compiled_for_the_device_and_loaded_once(pretended_gpu):
    first = load_module("code", ("-x",), torch.device("cuda", 0))
    assert bytes((ctypes.c_char * 16).in_dll(pretended_gpu, "image")) == b"code sm_90 -x".ljust(16)
    assert load_module("code", ("-x",), torch.device("cuda", 0)) is first
    assert first.kernel("one_i") is first.kernel("one_i")
    assert number(pretended_gpu, "n_loads").value == 1
    second = load_module("code", ("-x",), torch.device("cuda"))  # the current device: the second
    assert second is load_module("code", ("-x",), torch.device("cuda", 1))
    assert load_module("code", ("-y",), torch.device("cuda", 0)) is not first
    assert number(pretended_gpu, "n_loads").value == 3
    second.kernel("one_i").launch((1, 1, 1), (1, 1, 1), 0, (5,))
    found = launched(pretended_gpu)
    assert (found.stream, found.context) == (STREAM + 1, CONTEXT + 1)


class PretendedCupy(types.ModuleType):
    """The part of cupy that starts kernels, writing down what it is told."""

    def __init__(self):
        super().__init__("cupy")
        self.calls, self.active = [], []
        self.cuda = types.SimpleNamespace(
            Device=lambda index: self._inside(("device", index)),
            ExternalStream=lambda pointer, index: self._inside(("stream", pointer, index)),
            driver=types.SimpleNamespace(CUDADriverError=RuntimeError),
            compiler=types.SimpleNamespace(CompileException=SyntaxError),
        )

    @contextlib.contextmanager
    def _inside(self, what):
        self.active.append(what)
        try:
            yield
        finally:
            self.active.remove(what)

    def RawModule(self, *, code, backend, options):
        def get_function(name):
            if name == "absent":
                raise RuntimeError("named symbol not found")
            return PretendedFunction(self, name)

        self.calls.append((code, backend, options))
        return types.SimpleNamespace(get_function=get_function)


class PretendedFunction:
    num_regs = 32

    def __init__(self, cupy, name):
        self.cupy, self.name = cupy, name

    def __call__(self, grid, block, args, shared_mem=0):
        self.cupy.calls.append((self.name, grid, block, args, shared_mem, tuple(self.cupy.active)))


@pytest.fixture
def cupy(pretended_gpu, monkeypatch):
    made = PretendedCupy()
    made.__spec__ = types.SimpleNamespace(name="cupy")
    monkeypatch.setitem(sys.modules, "cupy", made)
    return made


def test_cupy_is_the_second_choice_and_the_log_says_so(cupy, monkeypatch, caplog):
    caplog.set_level("INFO")
    device = torch.device("cuda", 0)
    assert isinstance(load_module("code", (), device), DriverModule)
    assert "started by driver" in caplog.text
    monkeypatch.setattr(nvrtc, "availability", lambda: Availability(False, "no NVRTC: install it"))
    assert module.availability()
    load_module("code", ("-x",), device)
    assert "started by cupy" in caplog.text
    assert cupy.calls == [("code", "nvrtc", ("-x",))]
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(module, "_has_cupy", lambda: False)
    assert not module.availability()
    with pytest.raises(UnavailableError, match="no NVRTC: install it"):
        load_module("code", (), device)


def test_cupy_gets_arguments_of_the_right_sizes_on_torchs_stream(cupy, monkeypatch):
    monkeypatch.setattr(nvrtc, "availability", lambda: Availability(False, "no NVRTC"))
    kernel = load_module("code", (), torch.device("cuda", 0)).kernel("mixed")
    kernel._index = -1  # so that tensors of the CPU pass
    tensor = torch.zeros(2)
    kernel.launch((3, 2, 1), (64, 1, 1), 48, (tensor, -7, None))
    name, grid, block, args, shared, active = cupy.calls[-1]
    assert (name, grid, block, shared) == ("mixed", (3, 2, 1), (64, 1, 1), 48)
    assert active == (("device", -1), ("stream", STREAM - 1, -1))
    assert [value.dtype for value in args] == [np.uint64, np.int32, np.uint64]
    assert [value.item() for value in args] == [tensor.data_ptr(), -7, 0]
    for value in (2**31, True, np.int32(1)):
        with pytest.raises(KernelError, match="mixed, argument 0"):
            kernel.launch((1, 1, 1), (1, 1, 1), 0, (value,))
    kernel.allow_shared(70_000)
    assert kernel._function.max_dynamic_shared_size_bytes == 70_000
    with pytest.raises(KernelError, match="absent: named symbol not found"):
        load_module("code", (), torch.device("cuda", 0)).kernel("absent")
