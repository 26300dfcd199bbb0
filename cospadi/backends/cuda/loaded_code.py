"""Abstract kernels: compiled, loaded onto a GPU and found by name."""

import abc
from typing import TypeAlias

from cospadi.backends.cuda.arguments import Argument

Size: TypeAlias = tuple[int, int, int]
"""Of a grid in blocks, or of a block in threads: x, y, z."""


class Kernel(abc.ABC):
    """A kernel on one GPU."""

    @abc.abstractmethod
    def launch(self, grid: Size, block: Size, shared_bytes: int, args: tuple[Argument, ...]) -> None:
        """Queue the kernel on torch's current stream.

        Does not wait and allocates no memory on the GPU, so that CUDA graphs can capture it.

        Parameters
        ----------
        grid, block : tuple of three int
        shared_bytes : int
            Dynamic shared memory of a block; more than 48 KiB must have been asked for with ``allow_shared``.
        args : tuple of Tensor, int or None
            See ``Argument``.  Tensors must lie on the kernel's GPU.

        Raises
        ------
        KernelError
            An argument does not fit, or the driver refuses.
        """

    @abc.abstractmethod
    def allow_shared(self, shared_bytes: int) -> None:
        """Let blocks have that much dynamic shared memory.

        Raises
        ------
        KernelError
            The GPU has less.
        """


class Module(abc.ABC):
    """The kernels of one source on one GPU."""

    @abc.abstractmethod
    def kernel(self, name: str) -> Kernel:
        """Give a kernel by its ``extern "C"`` name and load it.  A CUDA graph cannot capture the loading.

        Raises
        ------
        KernelError
            There is none of this name.
        """
