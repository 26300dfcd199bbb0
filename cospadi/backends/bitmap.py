"""The coefficients of layers as kernels read them: a bit mask, values and scales, the layers' columns side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.formats import FORMATS, PackedCoefficients, count_bits, read_values


@dataclass(frozen=True)
class Bitmap:
    """S of one or several layers, column by column.

    Attributes
    ----------
    n_atoms : int
        Rows of S.
    ends : tuple of int
        Columns up to and including each layer, so that layer m has the columns ``ends[m - 1]`` to ``ends[m]``.
    mask : Tensor, shape (out_features, ceil(n_atoms / 8)), uint8
        One row of bits per column of S, the lowest bit first.
    values : Tensor, shape (n_stored,), floating or int8
        Of the bits that are set, column by column, by ascending atom.
    starts : Tensor, shape (out_features + 1,), int64
        Where the values of each column begin; the last entry is ``n_stored``.
    scales : Tensor, shape (out_features,), float32, or None
        For int8 values: column j is its values times ``scales[j]``.
    """

    n_atoms: int
    ends: tuple[int, ...]
    mask: Tensor
    values: Tensor
    starts: Tensor
    scales: Tensor | None

    @property
    def out_features(self) -> int:
        """Number of columns of all layers."""
        return self.ends[-1]

    def columns(self, member: int | None) -> tuple[int, int]:
        """Give the first column of a layer and the one after its last (of all layers for None)."""
        return span(self.ends, member)


def span(ends: tuple[int, ...], member: int | None) -> tuple[int, int]:
    """Give where one of several parts side by side begins and ends (all of them for None), from the ends of all."""
    if member is None:
        return 0, ends[-1]
    return (ends[member - 1] if member else 0), ends[member]


def as_bitmask(packed: PackedCoefficients) -> PackedCoefficients:
    """Give the same coefficients in the format ``bitmask``, with the scales that they have."""
    codec = FORMATS.create("bitmask")
    if packed.format == codec.name:
        return packed
    stored = FORMATS.create(packed.format).unpack(packed)
    return codec.pack(stored, packed.value_dtype, packed.tensors.get("scales"))


def bitmap_of(members: Sequence[PackedCoefficients], device: torch.device) -> Bitmap:
    """Join layers stored in any format on a device.

    Raises
    ------
    CheckpointError
        The stored tensors contradict each other.
    """
    masks: list[Tensor] = []
    values: list[Tensor] = []
    scales: list[Tensor] = []
    ends: list[int] = []
    for packed in members:
        tensors = {name: tensor.detach().to(device) for name, tensor in packed.tensors.items()}
        packed = PackedCoefficients(packed.format, packed.n_atoms, packed.out_features, packed.value_dtype, tensors)
        packed = as_bitmask(packed)
        codec = FORMATS.create(packed.format)
        codec.check(packed)
        mask, count = packed.tensors["mask"], codec.n_stored(packed)
        masks.append(mask)
        values.append(read_values(packed.tensors["values"], (count,), packed.value_dtype))
        scales += [packed.tensors["scales"]] if "scales" in packed.tensors else []
        ends.append((ends[-1] if ends else 0) + packed.out_features)
    mask = torch.cat(masks)
    counts = torch.cat([count_bits(mask).new_zeros(1), count_bits(mask)])
    return Bitmap(
        members[0].n_atoms,
        tuple(ends),
        mask,
        torch.cat(values),
        counts.cumsum(0),
        torch.cat(scales) if scales else None,
    )
