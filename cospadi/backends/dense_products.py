"""The two dense products x D and z S, which several backends share."""

from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.backends.base import Backend, Placement
from cospadi.formats.base import FORMATS, PackedCoefficients
from cospadi.registry import Availability

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class DenseProducts(Backend):
    """Base of the backends that hold S with its zeros and multiply twice in the dtype of x."""

    @final
    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    @final
    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> Tensor:
        """Unpack S with its zeros."""
        return unpacked(packed, placement)

    @final
    def project(self, dictionary: Tensor, x: Tensor) -> Tensor:
        """Multiply by the dense dictionary."""
        return multiply(x, dictionary)

    @final
    def combine(self, coefficients: Tensor, z: Tensor) -> Tensor:
        """Multiply by the dense coefficients."""
        return multiply(z, coefficients)


def placed(matrix: Tensor, placement: Placement) -> Tensor:
    """Give a stored (out, in) matrix at its place; a dtype change happens there, where it is fast."""
    return matrix.detach().to(placement.device).to(placement.dtype).contiguous()


def unpacked(packed: PackedCoefficients, placement: Placement) -> Tensor:
    """Give the transpose of S, shape (out_features, n_atoms), at its place; unpacked there, so that little is moved."""
    tensors = {name: tensor.detach().to(placement.device) for name, tensor in packed.tensors.items()}
    at_place = PackedCoefficients(packed.format, packed.n_atoms, packed.out_features, packed.value_dtype, tensors)
    rows = FORMATS.create(packed.format).unpack(at_place).T
    return rows.to(placement.dtype).contiguous()


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply by the transpose of an (out, in) matrix."""
    return functional.linear(x, matrix)


def gpu_support(placement: Placement) -> Availability:
    """Tell whether the place is an NVIDIA GPU and the dtype one of the four floating dtypes."""
    if placement.device.type != "cuda":
        return Availability(False, f"the layer is on {placement.device}: move the model to a CUDA device")
    return float_support(placement)


def float_support(placement: Placement) -> Availability:
    """Tell whether the dtype is one of the four floating dtypes."""
    if placement.dtype not in FLOATS:
        return Availability(False, f"inputs of {placement.dtype} are not supported: use a floating dtype")
    return Availability(True)
