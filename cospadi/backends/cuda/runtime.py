"""NVIDIA GPUs: fused kernels that read S as bits and values, cuBLAS where many tokens make dense products cheaper."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.arrays import cuda_availability
from cospadi.backends.base import Backend, Placement
from cospadi.backends.bitmap import bitmap_of
from cospadi.backends.cuda import driver, launches
from cospadi.backends.cuda.layout import ALIGNMENT, TILE, Rows, Slabs, rows_of, slabs_of
from cospadi.backends.dense_products import (
    DenseCoefficients,
    dense_coefficients,
    gpu_support,
    is_identity,
    placed,
    projected,
    without_strings,
)
from cospadi.errors import UsageError
from cospadi.formats import PackedCoefficients, PackedDictionary
from cospadi.registry import Availability

FUSED_DTYPES = (torch.bfloat16, torch.float16)
OLDEST = (8, 0)
"""First compute capability with matrix instructions for bfloat16 and with asynchronous copies."""


@dataclass(frozen=True)
class Machine:
    """A GPU with the kernels on it.

    Attributes
    ----------
    module : Module
        Of ``driver.load_module``.
    n_processors : int
        Multiprocessors.
    side : Stream or None
        For work beside the current stream.
    """

    module: Any
    n_processors: int
    side: torch.cuda.Stream | None


@dataclass(frozen=True)
class FusedCoefficients:
    """The coefficients of a group and the GPU that holds them.

    Attributes
    ----------
    slabs : Slabs or None
        None where S is the identity.
    machine : Machine
    """

    slabs: Slabs | None
    machine: Machine


@final
@dataclass(frozen=True, kw_only=True)
class CudaBackend(Backend):
    """Fused kernels for bfloat16 and float16; two dense products for float32 and float64.

    x D is rounded to the dtype of x in between; sums are in float32 and have a fixed order.

    Parameters
    ----------
    project_tokens : int
        Up to so many tokens a kernel that reads D once computes x D, at the speed of the memory, also from 8 bits.  For
        more tokens cuBLAS does; an 8-bit D is then expanded on every call.
    combine_tokens : int
        Up to so many tokens S is read as bits and values.  For more tokens it is expanded on every call, on a second
        stream while x D is computed, and multiplied by cuBLAS.
    """

    name: ClassVar[str] = "cuda"
    project_tokens: int = 16
    combine_tokens: int = 256

    def __post_init__(self) -> None:
        for option in ("project_tokens", "combine_tokens"):
            if getattr(self, option) < 0:
                raise UsageError(f"{option}={getattr(self, option)}: give a number of tokens, 0 for never")

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether torch finds a CUDA GPU."""
        return cuda_availability()

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Accept every floating dtype on GPUs from compute capability 8.0 on; the 16-bit ones need a compiler."""
        state = gpu_support(placement)
        if not state:
            return state
        capability = torch.cuda.get_device_capability(placement.device)
        if capability < OLDEST:
            found, oldest = ".".join(map(str, capability)), ".".join(map(str, OLDEST))
            return Availability(
                False, f"the GPU has compute capability {found}, the kernels need {oldest}: choose backend 'torch'"
            )
        return driver.availability() if placement.dtype in FUSED_DTYPES else state

    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> Rows | Tensor:
        """Pad a 16-bit or int8 dictionary; convert strings of bits, and all dictionaries for the longer dtypes."""
        if placement.dtype not in FUSED_DTYPES:
            return placed(dictionary, placement)
        return rows_of(without_strings(dictionary, placement), placement.device, placement.dtype)

    def prepare_coefficients(
        self, members: Sequence[PackedCoefficients], placement: Placement
    ) -> FusedCoefficients | DenseCoefficients:
        """Cut S into slabs, unless it is the identity, and compile the kernels; unpack it for the longer dtypes."""
        if placement.dtype not in FUSED_DTYPES:
            return dense_coefficients(members, placement)
        if is_identity(members):
            return FusedCoefficients(None, machine_of(placement.device))
        slabs = slabs_of(bitmap_of(members, placement.device), placement.dtype)
        return FusedCoefficients(slabs, machine_of(placement.device))

    def multiply(self, dictionary: Any, coefficients: Any, x: Tensor, member: int | None) -> Tensor:
        """Multiply with the kernels that are fastest for the number of tokens."""
        if isinstance(coefficients, DenseCoefficients):
            return coefficients.multiply(projected(dictionary, x), member)
        slabs, machine = coefficients.slabs, coefficients.machine
        if slabs is None:
            n_atoms = dictionary.n_atoms
            if not x.shape[0]:
                return x.new_empty(0, n_atoms)
            return self._project(dictionary, x, -(-n_atoms // TILE) * TILE, machine)[:, :n_atoms].contiguous()
        n_tokens = x.shape[0]
        first, last = slabs.columns_of(member)
        y = x.new_empty(n_tokens, last - first)
        if n_tokens == 0:
            return y
        if n_tokens <= self.combine_tokens:
            z = self._project(dictionary, x, slabs.padded_atoms, machine)
            launches.run(machine.module, launches.combine(slabs, z, y, member, machine.n_processors))
            return y
        dense = x.new_empty(last - first, slabs.padded_atoms)
        if machine.side is None:
            launches.run(machine.module, launches.densify(slabs, dense, member))
            z = self._project(dictionary, x, slabs.padded_atoms, machine)
        else:
            # Waiting on both sides keeps the memory of `dense` in the order of the current stream, and lets a CUDA
            # graph capture both branches.
            current = torch.cuda.current_stream(x.device)
            machine.side.wait_stream(current)
            with torch.cuda.stream(machine.side):
                launches.run(machine.module, launches.densify(slabs, dense, member))
            z = self._project(dictionary, x, slabs.padded_atoms, machine)
            current.wait_stream(machine.side)
        return torch.mm(z, dense.T, out=y)

    def _project(self, rows: Rows | None, x: Tensor, padded_atoms: int, machine: Machine) -> Tensor:
        """Give z = x D, zero beyond n_atoms; without a dictionary z = x."""
        if rows is None:
            return _aligned(x, padded_atoms)
        z = x.new_empty(x.shape[0], padded_atoms)
        if x.shape[0] <= self.project_tokens:
            launches.run(machine.module, launches.project(rows, _aligned(x, rows.row_length), z, machine.n_processors))
            return z
        if rows.scales is None:
            matrix = rows.values[:, : rows.in_features]
        else:
            matrix = torch.mul(
                rows.values[:, : rows.in_features],
                rows.scales.unsqueeze(1),
                out=x.new_empty(rows.n_atoms, rows.in_features),
            )
        z[:, rows.n_atoms :].zero_()
        torch.mm(x, matrix.T, out=z[:, : rows.n_atoms])
        return z


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """Give a GPU with the kernels loaded; compiles them when called for the first time.

    Raises
    ------
    UnavailableError
        The kernels cannot be compiled here.
    KernelError
        The GPU refuses them.
    """
    source = resources.files("cospadi.backends.cuda").joinpath("kernels.cu").read_text(encoding="utf-8")
    module = driver.load_module(source, ("-std=c++17",), device)
    for name in launches.kernels():
        module.kernel(name)  # loaded now, since a CUDA graph cannot capture the loading
    for name in launches.kernels_with_much_shared_memory():
        module.kernel(name).allow_shared(launches.SHARED_LIMIT)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Machine(module, processors, torch.cuda.Stream(device))


def _aligned(x: Tensor, row_length: int) -> Tensor:
    """Give x with rows of the length that the kernels read and with an aligned address."""
    if x.shape[1] != row_length:
        return functional.pad(x, (0, row_length - x.shape[1]))
    return x.clone() if x.data_ptr() % ALIGNMENT else x
