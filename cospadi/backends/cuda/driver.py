"""Loading and launching of compiled kernels by the functions of the CUDA driver.

If NVRTC is missing and cupy is installed, cupy compiles and launches the same source.
"""

import ctypes
import functools
import importlib.util
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, final

import torch

from cospadi.backends.cuda import nvrtc
from cospadi.backends.cuda.arguments import Argument, ArgumentMemory
from cospadi.backends.cuda.loaded_code import Kernel, Module, Size
from cospadi.backends.cuda.nvrtc import KernelError
from cospadi.errors import UnavailableError
from cospadi.registry import Availability

_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_...

logger = logging.getLogger(__name__)


def availability() -> Availability:
    """Tell whether kernels can be compiled here, by NVRTC or by cupy."""
    state = nvrtc.availability()
    return Availability(True) if not state and _has_cupy() else state


def load_module(source: str, options: tuple[str, ...], device: torch.device) -> Module:
    """Compile a source for a GPU and load it, once for each source, options and GPU.

    The driver starts the kernels; cupy does where there is no NVRTC.

    Parameters
    ----------
    source : str
        CUDA C++ that includes no file.
    options : tuple of str
        Of NVRTC, but for the architecture, which follows from the device.
    device : torch.device
        A CUDA device.

    Raises
    ------
    UnavailableError
        Neither NVRTC nor cupy is installed, or NVRTC is older than the GPU.
    KernelError
        The source does not compile or cannot be loaded.
    """
    state = nvrtc.availability()
    if not state and not _has_cupy():
        raise UnavailableError(state.reason)
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    with _loading:
        return _load(source, options, index, "driver" if state else "cupy")


_loading = threading.Lock()
"""Keeps threads that prepare layers at the same time from compiling and loading the same source twice."""


@functools.cache
def _load(source: str, options: tuple[str, ...], index: int, loader: Literal["driver", "cupy"]) -> Module:
    logger.info("the kernels for cuda:%d are compiled and started by %s", index, loader)
    if loader == "cupy":
        from cospadi.backends.cuda.cupy_loader import CupyModule

        return CupyModule(source, options, index)
    architecture = nvrtc.architecture_for(torch.cuda.get_device_capability(index))
    cubin = nvrtc.compile_cubin(source, architecture, options).cubin
    return DriverModule(open_driver(), cubin, index, lambda: torch.cuda.current_stream(index).cuda_stream)


def _has_cupy() -> bool:
    return importlib.util.find_spec("cupy") is not None


@final
class Driver:
    """The driver's library, with errors as exceptions.

    Parameters
    ----------
    library : ctypes.CDLL
    """

    def __init__(self, library: Any) -> None:
        pointer, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        arguments = {
            "cuDeviceGet": [pointer, number],
            "cuDevicePrimaryCtxRetain": [pointer, number],
            "cuCtxGetCurrent": [pointer],
            "cuCtxPushCurrent_v2": [pointer],
            "cuCtxPopCurrent_v2": [pointer],
            "cuModuleLoadData": [pointer, text],
            "cuModuleGetFunction": [pointer, pointer, text],
            "cuFuncSetAttribute": [pointer, number, number],
            "cuLaunchKernel": [pointer, *[ctypes.c_uint] * 7, pointer, pointer, pointer],
            "cuGetErrorName": [number, pointer],
            "cuGetErrorString": [number, pointer],
        }
        for name, kinds in arguments.items():
            getattr(library, name).argtypes = kinds
        self.library = library

    def check(self, code: int, doing: str) -> None:
        """Raise for a result other than success.

        Raises
        ------
        KernelError
            With what was being done, the error's name and its text.
        """
        if code != 0:
            name, text = (self._describe(function, code) for function in ("cuGetErrorName", "cuGetErrorString"))
            raise KernelError(f"{doing}: {name} ({text})")

    def _describe(self, function: str, code: int) -> str:
        found = ctypes.c_char_p()
        if getattr(self.library, function)(code, ctypes.byref(found)) != 0 or found.value is None:
            return f"CUDA error {code}"  # newer than the driver's own table
        return found.value.decode(errors="replace")

    def primary_context(self, index: int) -> int:
        """Give the context that torch uses on a device."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.check(self.library.cuDeviceGet(ctypes.byref(device), index), f"finding cuda:{index}")
        self.check(self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device.value), f"using cuda:{index}")
        assert context.value is not None
        return context.value

    @contextmanager
    def within(self, context: int) -> Iterator[None]:
        """Make a context the thread's current one for a while."""
        self.check(self.library.cuCtxPushCurrent_v2(context), "entering the context")
        try:
            yield
        finally:
            self.check(self.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())), "leaving the context")


@functools.cache
def open_driver() -> Driver:
    """Load the driver's library.

    Raises
    ------
    UnavailableError
        There is none.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return Driver(ctypes.CDLL(name))
    except OSError as error:
        raise UnavailableError(f"the NVIDIA driver's library {name} cannot be loaded: {error}") from error


@final
class DriverModule(Module):
    """Machine code that the driver holds; stays loaded until the process ends.

    Parameters
    ----------
    driver : Driver
    cubin : bytes
    index : int
        Of the device.
    stream : callable
        Gives torch's current stream on the device, as a pointer.
    """

    def __init__(self, driver: Driver, cubin: bytes, index: int, stream: Callable[[], int]) -> None:
        self._driver, self._index, self._stream = driver, index, stream
        self._cubin = cubin  # a driver that loads lazily may read it again for each kernel
        self._context = driver.primary_context(index)
        self._handle = ctypes.c_void_p()
        self._kernels: dict[str, Kernel] = {}
        with driver.within(self._context):
            driver.check(driver.library.cuModuleLoadData(ctypes.byref(self._handle), cubin), "loading the kernels")

    def kernel(self, name: str) -> Kernel:
        """Give a kernel; the driver loads it now, also when it loads lazily."""
        if name not in self._kernels:
            function, library = ctypes.c_void_p(), self._driver.library
            with self._driver.within(self._context):
                code = library.cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode())
                self._driver.check(code, f"finding the kernel {name}")
            assert function.value is not None
            self._kernels[name] = DriverKernel(
                self._driver, self._context, function.value, name, self._index, self._stream
            )
        return self._kernels[name]


@final
class DriverKernel(Kernel):
    """One function of a ``DriverModule``."""

    def __init__(
        self, driver: Driver, context: int, function: int, name: str, index: int, stream: Callable[[], int]
    ) -> None:
        self._driver, self._context, self._function = driver, context, function
        self._name, self._index, self._stream = name, index, stream
        self._memories = _Memories()

    def launch(self, grid: Size, block: Size, shared_bytes: int, args: tuple[Argument, ...]) -> None:
        """Queue the kernel."""
        library, current = self._driver.library, ctypes.c_void_p()
        pointers = self._memory(tuple(map(type, args))).fill(args, self._name, self._index)
        given = (self._function, *grid, *block, shared_bytes, self._stream(), pointers, None)
        code = library.cuCtxGetCurrent(ctypes.byref(current))
        if code == 0 and current.value == self._context:
            code = library.cuLaunchKernel(*given)
        elif code == 0:
            # A thread that has not used this GPU yet has another context or none.  Its context is restored, because
            # the CUDA runtime takes the current context as the device that the thread has chosen.
            with self._driver.within(self._context):
                code = library.cuLaunchKernel(*given)
        if code != 0:
            size = f"grid {grid}, block {block}, {shared_bytes} bytes of dynamic shared memory"
            self._driver.check(code, f"starting the kernel {self._name} ({size})")

    def allow_shared(self, shared_bytes: int) -> None:
        """Set the function's attribute."""
        with self._driver.within(self._context):
            code = self._driver.library.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
            self._driver.check(code, f"giving the kernel {self._name} {shared_bytes} bytes of dynamic shared memory")

    def _memory(self, kinds: tuple[type, ...]) -> ArgumentMemory:
        """Give memory for arguments of these types, private to the thread: other threads run during a call."""
        made = self._memories.of_types
        if kinds not in made:
            made[kinds] = ArgumentMemory(kinds, self._name)
        return made[kinds]


class _Memories(threading.local):
    """Every thread's memories for arguments, by the arguments' types."""

    def __init__(self) -> None:
        self.of_types: dict[tuple[type, ...], ArgumentMemory] = {}
