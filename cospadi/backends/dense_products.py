"""The two dense products x D and z S, which several backends share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.backends.base import Backend, Placement
from cospadi.backends.bitmap import span
from cospadi.formats import FORMATS, PackedCoefficients, PackedDictionary, unpack_dictionary
from cospadi.registry import Availability

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class DenseCoefficients:
    """S^T of several layers with its zeros, one below the other.

    Attributes
    ----------
    rows : Tensor, shape (out_features of all, n_atoms), or None
        None where S is the identity, of a layer that is only quantised.
    ends : tuple of int
        Rows up to and including each layer.
    """

    rows: Tensor | None
    ends: tuple[int, ...]

    def of(self, member: int | None) -> Tensor | None:
        """Give the rows of one layer, or all."""
        return None if self.rows is None else self.rows[slice(*span(self.ends, member))]

    def multiply(self, z: Tensor, member: int | None) -> Tensor:
        """Give z S of one layer, or all; z itself where S is the identity."""
        rows = self.of(member)
        return z if rows is None else functional.linear(z, rows)

    def multiply_transposed(self, y: Tensor) -> Tensor:
        """Give y S^T of all layers; y itself where S is the identity."""
        return y if self.rows is None else y @ self.rows


class DenseProducts(Backend):
    """Base of the backends that hold S with its zeros and multiply twice in the dtype of x."""

    any_shape: ClassVar[bool] = True

    @final
    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> Tensor:
        """Convert to the dtype of x."""
        return placed(dictionary, placement)

    @final
    def prepare_coefficients(self, members: Sequence[PackedCoefficients], placement: Placement) -> DenseCoefficients:
        """Unpack S with its zeros, unless it is the identity."""
        return dense_coefficients(members, placement)

    @final
    def multiply(
        self, dictionary: Tensor | None, coefficients: DenseCoefficients, x: Tensor, member: int | None
    ) -> Tensor:
        """Multiply by the dense dictionary, if there is one, then by the dense coefficients."""
        return coefficients.multiply(projected(dictionary, x), member)


def projected(dictionary: Tensor | None, x: Tensor) -> Tensor:
    """Give x D, with atoms as rows; x itself without a dictionary."""
    return x if dictionary is None else functional.linear(x, dictionary)


def placed(dictionary: PackedDictionary, placement: Placement) -> Tensor:
    """Give a dictionary with atoms as rows; it is converted on the device, where that is fast."""
    return unpack_dictionary(moved(dictionary, placement.device)).to(placement.dtype).contiguous()


def moved(dictionary: PackedDictionary, device: torch.device) -> PackedDictionary:
    """Move a stored dictionary to a device, contiguous."""
    values, scales = dictionary.values.detach().to(device).contiguous(), dictionary.scales
    return replace(
        dictionary, values=values, scales=None if scales is None else scales.detach().to(device).contiguous()
    )


def without_strings(dictionary: PackedDictionary, placement: Placement) -> PackedDictionary:
    """Give a dictionary that kernels can read: strings of bits become numbers in the dtype of x."""
    if dictionary.grid is None:
        return moved(dictionary, placement.device)
    return PackedDictionary(placed(dictionary, placement))


def dense_coefficients(members: Sequence[PackedCoefficients], placement: Placement) -> DenseCoefficients:
    """Unpack the coefficients of layers on the device."""
    ends = tuple(accumulate(packed.out_features for packed in members))
    if is_identity(members):
        return DenseCoefficients(None, ends)
    return DenseCoefficients(torch.cat([unpacked(packed, placement) for packed in members]), ends)


def is_identity(members: Sequence[PackedCoefficients]) -> bool:
    """Tell whether S is the identity, of a single layer."""
    return len(members) == 1 and FORMATS.create(members[0].format).is_identity


def unpacked(packed: PackedCoefficients, placement: Placement) -> Tensor:
    """Give S^T, shape (out_features, n_atoms); it is unpacked on the device, so that few bytes are moved."""
    tensors = {name: tensor.detach().to(placement.device) for name, tensor in packed.tensors.items()}
    at_place = PackedCoefficients(packed.format, packed.n_atoms, packed.out_features, packed.value_dtype, tensors)
    rows = FORMATS.create(packed.format).unpack(at_place).T
    return rows.to(placement.dtype).contiguous()


def gpu_support(placement: Placement) -> Availability:
    """Tell whether the device is an NVIDIA GPU and the dtype one of the four floating dtypes."""
    if placement.device.type != "cuda":
        return Availability(False, f"the layer is on {placement.device}: move the model to a CUDA device")
    return float_support(placement)


def float_support(placement: Placement) -> Availability:
    """Tell whether the dtype is one of the four floating dtypes."""
    if placement.dtype not in FLOATS:
        return Availability(False, f"inputs of {placement.dtype} are not supported: use a floating dtype")
    return Availability(True)
