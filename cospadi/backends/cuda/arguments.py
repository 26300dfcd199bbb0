"""Arguments of kernels: pointers and 32-bit integers."""

import ctypes
import struct
from typing import Any, TypeAlias, final

from torch import Tensor

from cospadi.backends.cuda.nvrtc import KernelError

Argument: TypeAlias = Tensor | int | None
"""A pointer to the first element of a tensor, an int32, or a null pointer."""


def address_of(tensor: Tensor, index: int, name: str, position: int) -> int:
    """Give the address of a tensor, which must be on the device of this index.

    Raises
    ------
    KernelError
        The tensor, argument ``position`` of the kernel ``name``, is on another device.
    """
    if tensor.get_device() != index:
        raise KernelError(f"kernel {name}, argument {position}: the tensor is on {tensor.device}, not on cuda:{index}")
    return tensor.data_ptr()


def letter_of(kind: type, name: str, position: int) -> str:
    """Give the letter of module ``struct`` for arguments of a type: P or i.

    Raises
    ------
    KernelError
        No argument can have this type; a bool is no int.
    """
    if kind is int:
        return "i"
    if kind is type(None) or issubclass(kind, Tensor):
        return "P"
    raise KernelError(f"kernel {name}, argument {position}: {kind.__name__} is no tensor, int or None")


@final
class ArgumentMemory:
    """Memory that the driver copies a kernel's arguments from, while it is called.

    Parameters
    ----------
    kinds : tuple of type
        Of the arguments.
    name : str
        Of the kernel.
    """

    def __init__(self, kinds: tuple[type, ...], name: str) -> None:
        letters = "".join(letter_of(kind, name, position) for position, kind in enumerate(kinds))
        self._tensors = [position for position, kind in enumerate(kinds) if issubclass(kind, Tensor)]
        self._nulls = [position for position, kind in enumerate(kinds) if kind is type(None)]
        self._layout = struct.Struct(f"@{letters}")
        self._content = ctypes.create_string_buffer(max(self._layout.size, 1))
        start = ctypes.addressof(self._content)
        # "0" and a letter end a struct where a member of that letter could begin.
        offsets = [struct.calcsize(f"@{letters[:position]}0{letter}") for position, letter in enumerate(letters)]
        self._pointers = (ctypes.c_void_p * len(letters))(*(start + offset for offset in offsets))
        self._address = ctypes.addressof(self._pointers)

    def fill(self, args: tuple[Argument, ...], name: str, index: int) -> int:
        """Write arguments of these types; gives the address of the array of pointers to them.

        Raises
        ------
        KernelError
            A tensor is not on the device, or a number does not fit into 32 bits.
        """
        values: list[Any] = list(args)
        for position in self._tensors:
            values[position] = address_of(values[position], index, name, position)
        for position in self._nulls:
            values[position] = 0
        try:
            self._layout.pack_into(self._content, 0, *values)
        except struct.error as error:
            raise KernelError(f"kernel {name}: {error}, got {tuple(values)}") from error
        return self._address
