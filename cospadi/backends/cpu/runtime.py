"""The ``cpu`` backend: kernels on the stored bits for few tokens, two dense products for many tokens.

With few tokens the time goes into reading the bytes of a layer.  The kernels of kernels.c read D, mask and values as
they are stored and expand them in registers.  With many tokens the time goes into arithmetic, where the dense product
of torch (oneDNN) is fastest.  S is then written out with its zeros first.

There is no kernel for whole numbers of fewer than 8 bits yet.  Such a dictionary is converted to the dtype of x, and
such coefficients to 8 bits, when they are prepared.  A layer that is only quantised takes the product with D alone.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.backends.base import Backend, Placement
from cospadi.backends.bitmap import as_bitmask
from cospadi.backends.cpu import library
from cospadi.backends.dense_products import is_identity, placed, projected, without_strings
from cospadi.errors import CospadiError, UnavailableError, UsageError
from cospadi.formats import PackedCoefficients, PackedDictionary, count_bits, read_values
from cospadi.registry import Availability

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.int8: 3}
_ROOM = 64
"""Bytes by which a load may run past the data that it needs."""

_PART_BYTES = 1 << 23
"""Bytes of dense S that are written out at a time.  They fit into a last-level cache."""

_STACK_BYTES = 1 << 17
"""Most bytes of scratch for one token that the kernels take from the stack."""

MAX_KERNEL_TOKENS = 32
"""Most tokens for which the kernels are chosen, unless another number was measured (docs/backends.md)."""


@dataclass(frozen=True)
class _Dictionary:
    """``struct dictionary`` and the tensors whose memory it names."""

    struct: library.Dictionary
    address: int
    in_features: int
    scratch_bytes: int  # for every token
    packed: PackedDictionary
    placement: Placement


@dataclass(frozen=True)
class _Coefficients:
    """``struct coefficients`` of each layer, none where S is the identity, and the tensors whose memory they name."""

    structs: ctypes.Array[Any]
    addresses: tuple[int, ...]
    widths: tuple[int, ...]
    total: int
    n_atoms: int
    scratch_bytes: int  # for every token, where there is no dictionary
    io: int  # kind of x and y
    kept: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class CpuBackend(Backend):
    """Kernels in C for decoding (AVX-512, AVX2, NEON or plain C), dense products of torch for many tokens.

    Attributes
    ----------
    max_tokens : int or None
        Most tokens for which the kernels are chosen; ``MAX_KERNEL_TOKENS`` if not given.  Backend ``auto`` gives what
        ``cospadi-cli tune`` measured.
    instructions : {"best", "avx512", "avx2", "neon", "portable"}
        Instruction set of the kernels.
    """

    name: ClassVar[str] = "cpu"
    any_shape: ClassVar[bool] = True

    max_tokens: int | None = None
    instructions: Literal["best", "avx512", "avx2", "neon", "portable"] = "best"

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UsageError(f"max_tokens={self.max_tokens}: expected 0 or more")

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether the kernels are or can be compiled here."""
        try:
            library.load()
        except CospadiError as error:
            return Availability(False, str(error))
        return Availability(True)

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept bfloat16, float16 and float32 inputs on a CPU."""
        if placement.device.type != "cpu":
            return Availability(False, f"the layer is on {placement.device}: move the model to the CPU")
        if placement.dtype not in _KINDS or placement.dtype == torch.int8:
            return Availability(
                False, f"inputs of {placement.dtype} are not supported: use bfloat16, float16 or float32"
            )
        state = self.availability()
        if state and self.instructions != "best" and self.instructions not in library.levels():
            return Availability(
                False, f"this machine has no {self.instructions} kernels (it has: {', '.join(library.levels())})"
            )
        return state

    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> _Dictionary:
        """Keep the tensors as they are stored; convert strings of bits."""
        # The kernels need addresses in the memory of the CPU, so tensors on other devices are moved.
        packed = without_strings(dictionary, placement)
        values, scales = packed.values, packed.scales
        struct = library.Dictionary(values.data_ptr(), _address(scales), *values.shape, _KINDS[values.dtype])
        n_atoms, in_features = values.shape
        scratch_bytes = _scratch_bytes(in_features, n_atoms)
        return _Dictionary(struct, ctypes.addressof(struct), in_features, scratch_bytes, packed, placement)

    def prepare_coefficients(self, members: Sequence[PackedCoefficients], placement: Placement) -> _Coefficients:
        """Keep a bitmask as it is stored; convert other formats and strings of bits."""
        kept: list[Tensor] = []
        widths = tuple(packed.out_features for packed in members)
        n_atoms, io = members[0].n_atoms, _KINDS[placement.dtype]
        sizes = (widths, sum(widths), n_atoms, _scratch_bytes(0, n_atoms), io)
        if is_identity(members):
            return _Coefficients((library.Coefficients * 0)(), (), *sizes, ())
        structs = (library.Coefficients * len(members))(*(_struct(packed, kept) for packed in members))
        start, size = ctypes.addressof(structs), ctypes.sizeof(library.Coefficients)
        addresses = tuple(start + size * member for member in range(len(members)))
        return _Coefficients(structs, addresses, *sizes, tuple(kept))

    def multiply(
        self, dictionary: _Dictionary | None, coefficients: _Coefficients, x: Tensor, member: int | None
    ) -> Tensor:
        """Run the kernels, or write S out and multiply twice."""
        if dictionary is not None:
            address, in_features, scratch_bytes = dictionary.address, dictionary.in_features, dictionary.scratch_bytes
        else:
            assert coefficients.addresses, "neither of the two products is asked for"
            address, in_features, scratch_bytes = None, coefficients.n_atoms, coefficients.scratch_bytes
        n_tokens = x.numel() // in_features
        if n_tokens > (MAX_KERNEL_TOKENS if self.max_tokens is None else self.max_tokens):
            members = range(len(coefficients.widths)) if member is None else [member]
            return self._multiply_dense(dictionary, coefficients, x, members)
        if not coefficients.addresses:
            start, count, width = None, 0, coefficients.total
        elif member is None:
            start, count, width = coefficients.addresses[0], len(coefficients.widths), coefficients.total
        else:
            start, count, width = coefficients.addresses[member], 1, coefficients.widths[member]
        y = x.new_empty((*x.shape[:-1], width))
        scratch = None
        if n_tokens > 1 or scratch_bytes > _STACK_BYTES:
            scratch = torch.empty(scratch_bytes * (-(-n_tokens // 8) * 8) + 1024, dtype=torch.uint8)
        _kernels(self.instructions).multiply(
            address,
            start,
            count,
            x.data_ptr(),
            y.data_ptr(),
            None if scratch is None else scratch.data_ptr(),
            n_tokens,
            coefficients.io,
            torch.get_num_threads(),
        )
        return y

    def _multiply_dense(
        self, dictionary: _Dictionary | None, coefficients: _Coefficients, x: Tensor, members: Sequence[int]
    ) -> Tensor:
        """Write S out by parts that stay in the cache until they have been multiplied."""
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        z = projected(None if dictionary is None else placed(dictionary.packed, dictionary.placement), x)
        if not coefficients.addresses:
            return z.view(*shape[:-1], z.shape[1])
        n_atoms = z.shape[1]
        step = max(_PART_BYTES // max(n_atoms * x.element_size(), 1), 1)
        y = x.new_empty(x.shape[0], sum(coefficients.widths[m] for m in members))
        rows = x.new_empty(min(step, max(coefficients.widths[m] for m in members)), n_atoms)
        densify, io, threads = _kernels(self.instructions).densify, coefficients.io, torch.get_num_threads()
        start = 0
        for m in members:
            width = coefficients.widths[m]
            for first in range(0, width, step):
                count = min(step, width - first)
                densify(coefficients.addresses[m], rows.data_ptr(), first, count, io, threads)
                torch.mm(z, rows[:count].T, out=y[:, start + first : start + first + count])
            start += width
        return y.view(*shape[:-1], y.shape[1])


def dense_bf16(weight: Tensor, x: Tensor) -> Tensor:
    """Give x W^T by the kernel that multiplies by the dictionary: a hand-written yardstick for the benchmarks.

    Parameters
    ----------
    weight : Tensor, shape (out_features, in_features), bfloat16, contiguous
    x : Tensor, shape (n_tokens, in_features), bfloat16, contiguous

    Raises
    ------
    UnavailableError
        The processor has no AVX-512 with bfloat16.
    """
    if "avx512" not in library.levels():
        raise UnavailableError("the dense yardstick needs a processor with AVX-512 and bfloat16")
    struct = library.Dictionary(weight.data_ptr(), None, *weight.shape, _KINDS[torch.bfloat16])
    n_tokens = x.shape[0]
    y = x.new_empty(n_tokens, weight.shape[0])
    scratch = torch.empty((sum(weight.shape) + 2 * 63) * 2 * (-(-n_tokens // 8) * 8) + 1024, dtype=torch.uint8)
    _kernels("avx512").dense_bf16(
        ctypes.addressof(struct), x.data_ptr(), y.data_ptr(), scratch.data_ptr(), n_tokens, torch.get_num_threads()
    )
    return y


class _Kernels:
    """The functions of one instruction set."""

    def __init__(self, instructions: str) -> None:
        level = library.levels()[0] if instructions == "best" else instructions
        loaded = library.load()
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        self.multiply = loaded[f"multiply_{level}"]
        self.multiply.argtypes = [pointer, pointer, integer, pointer, pointer, pointer, integer, integer, integer]
        self.multiply.restype = None
        self.densify = loaded[f"densify_{level}"]
        self.densify.argtypes = [pointer, pointer, integer, integer, integer, integer]
        self.densify.restype = None
        if level == "avx512":
            self.dense_bf16 = loaded.dense_bf16_avx512
            self.dense_bf16.argtypes = [pointer, pointer, pointer, pointer, integer, integer]
            self.dense_bf16.restype = None


_LOADED: dict[str, _Kernels] = {}


def _kernels(instructions: str) -> _Kernels:
    if instructions not in _LOADED:
        _LOADED[instructions] = _Kernels(instructions)
    return _LOADED[instructions]


def _scratch_bytes(in_features: int, n_atoms: int) -> int:
    """Give the bytes of scratch for a token: x, z, z before rounding, all padded to whole steps, and two scales."""
    return 4 * (in_features + 2 * n_atoms + 3 * 63 + 2)  # in at most 4 bytes each


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _struct(packed: PackedCoefficients, kept: list[Tensor]) -> library.Coefficients:
    """Give the C structure of a layer; the tensors that it points to are added to ``kept``."""
    tensors = {name: tensor.detach().cpu() for name, tensor in packed.tensors.items()}
    packed = as_bitmask(replace(packed, tensors=tensors))
    mask = packed.tensors["mask"].contiguous()
    counts = count_bits(mask)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values = read_values(packed.tensors["values"], (int(starts[-1]),), packed.value_dtype).contiguous()
    scales = packed.tensors["scales"].contiguous() if "scales" in packed.tensors else None
    # The columns from `tail` on are those where a load could leave the mask or the values: they are copied.
    room = _ROOM // values.element_size()
    tail = min(
        packed.out_features - -(-_ROOM // max(mask.shape[1], 1)),
        int(torch.searchsorted(starts, int(starts[-1]) - room, right=True)) - 1,
    )
    tail = max(tail, 0)
    tail_mask = functional.pad(mask[tail:].reshape(-1), (0, _ROOM))
    tail_values = functional.pad(values[int(starts[tail]) :], (0, room))
    kept += [mask, values, starts, tail_mask, tail_values] + ([] if scales is None else [scales])
    return library.Coefficients(
        mask.data_ptr(),
        values.data_ptr(),
        starts.data_ptr(),
        _address(scales),
        tail_mask.data_ptr(),
        tail_values.data_ptr(),
        tail,
        packed.n_atoms,
        packed.out_features,
        mask.shape[1],
        _KINDS[values.dtype],
    )
