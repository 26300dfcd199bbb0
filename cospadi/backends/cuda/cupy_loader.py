"""The same kernels compiled and started by cupy, for machines without NVRTC of their own."""

import struct
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from cospadi.backends.cuda.arguments import Argument, address_of, letter_of
from cospadi.backends.cuda.loaded_code import Kernel, Module, Size
from cospadi.backends.cuda.nvrtc import KernelError


@final
class CupyModule(Module):
    """A ``cupy.RawModule``; cupy keeps what it compiled in its own cache.

    Parameters
    ----------
    source : str
    options : tuple of str
        cupy adds the architecture.
    index : int
        Of the device.
    """

    def __init__(self, source: str, options: tuple[str, ...], index: int) -> None:
        import cupy

        self._index = index
        self._module = cupy.RawModule(code=source, backend="nvrtc", options=options)

    def kernel(self, name: str) -> Kernel:
        """Give a kernel, compiled and loaded now."""
        import cupy

        try:
            with cupy.cuda.Device(self._index):
                function = self._module.get_function(name)
                # cupy loads a kernel when it is first used, which must not be while a CUDA graph is captured.
                _ = function.num_regs
        except (cupy.cuda.compiler.CompileException, cupy.cuda.driver.CUDADriverError) as error:
            raise KernelError(f"cupy, kernel {name}: {error}") from error
        return CupyKernel(function, name, self._index)


@final
class CupyKernel(Kernel):
    """A ``cupy.RawKernel``."""

    def __init__(self, function: Any, name: str, index: int) -> None:
        self._function, self._name, self._index = function, name, index

    def launch(self, grid: Size, block: Size, shared_bytes: int, args: tuple[Argument, ...]) -> None:
        """Queue the kernel."""
        import cupy

        converted = [self._converted(position, value) for position, value in enumerate(args)]
        stream = torch.cuda.current_stream(self._index).cuda_stream
        try:
            with cupy.cuda.Device(self._index), cupy.cuda.ExternalStream(stream, self._index):
                self._function(grid, block, tuple(converted), shared_mem=shared_bytes)
        except cupy.cuda.driver.CUDADriverError as error:
            raise KernelError(f"starting the kernel {self._name}: {error}") from error

    def allow_shared(self, shared_bytes: int) -> None:
        """Set the function's attribute."""
        import cupy

        try:
            with cupy.cuda.Device(self._index):
                self._function.max_dynamic_shared_size_bytes = shared_bytes
        except cupy.cuda.driver.CUDADriverError as error:
            raise KernelError(f"kernel {self._name}, {shared_bytes} bytes of shared memory: {error}") from error

    def _converted(self, position: int, value: Argument) -> Any:
        """Give a value whose type tells cupy its size: a plain int would get 64 bits, and None would be left out."""
        letter = letter_of(type(value), self._name, position)
        if isinstance(value, Tensor):
            return np.uint64(address_of(value, self._index, self._name, position))
        if value is None:
            return np.uint64(0)
        try:
            return np.frombuffer(struct.pack(letter, value), np.int32)[0]
        except struct.error as error:
            raise KernelError(f"kernel {self._name}, argument {position}: {error}, got {value}") from error
