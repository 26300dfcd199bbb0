"""S and D as the kernels of ``kernels.cu`` read them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.backends.bitmap import Bitmap, span
from cospadi.formats import PackedDictionary, pack_bits, unpack_bits

TILE = 16
"""Columns of a slab."""
SLAB_ATOMS = 64
"""Rows of a slab."""
ALIGNMENT = 16
"""Bytes that a thread copies at once; values of slabs and rows of D and x begin at multiples of it."""

_CHUNK = 1 << 24
"""Entries of S that are repacked at once, which bounds the memory that this takes."""


@dataclass(frozen=True)
class Slabs:
    """S of several layers in slabs of 16 columns by 64 atoms.

    The columns of each layer are cut into tiles of 16 and every tile into slabs along the atoms; the last ones are
    padded.  Bits and values of a slab are ordered so that lane 4 c + q of a warp finds in four neighbouring bits what
    it needs for one half of one product: bit 4 (32 (2 i + h) + 4 c + q) + j is column 8 h + c, atom 16 q + 4 i + j, for
    i, j, q < 4, h < 2 and c < 8.

    Attributes
    ----------
    n_atoms : int
        Rows of S, without padding.
    ends : tuple of int
        Columns up to and including each layer, without padding.
    tile_ends : tuple of int
        Tiles up to and including each layer.
    masks : Tensor, shape (n_tiles, n_slabs, 32), int32
    values : Tensor, shape (n_units * 16,), uint8
        Bytes of the values, those of every slab padded to whole units of 16 bytes.
    value_bytes : int
        Bytes of one value: 2 or 1.
    offsets : Tensor, shape (n_tiles * n_slabs + 1,), int32
        Where the values of each slab begin, in units.
    columns : Tensor, shape (n_tiles + 1,), int32
        The first column of each tile, counted without padding.
    scales : Tensor, shape (out_features,), float32, or None
    largest : int
        Bytes of the values of the largest slab, whole units.
    """

    n_atoms: int
    ends: tuple[int, ...]
    tile_ends: tuple[int, ...]
    masks: Tensor
    values: Tensor
    value_bytes: int
    offsets: Tensor
    columns: Tensor
    scales: Tensor | None
    largest: int

    @property
    def padded_atoms(self) -> int:
        """Rows of S with padding: the length that rows of z must have."""
        return self.masks.shape[1] * SLAB_ATOMS

    def columns_of(self, member: int | None) -> tuple[int, int]:
        """Give the first column of a layer and the one after its last (of all layers for None)."""
        return span(self.ends, member)

    def tiles_of(self, member: int | None) -> tuple[int, int]:
        """Give the first tile of a layer and the one after its last (of all layers for None)."""
        return span(self.tile_ends, member)


def slabs_of(bitmap: Bitmap, dtype: torch.dtype) -> Slabs:
    """Repack layers.

    Parameters
    ----------
    bitmap : Bitmap
        Not changed.
    dtype : torch.dtype
        A 16-bit floating dtype; values that are not int8 are rounded to it.
    """
    n_slabs = max(1, -(-bitmap.n_atoms // SLAB_ATOMS))
    values = bitmap.values if bitmap.values.dtype == torch.int8 else bitmap.values.to(dtype)
    step = max(1, _CHUNK // (n_slabs * SLAB_ATOMS * TILE)) * TILE
    masks, units, stored = [], [], []
    columns: list[int] = []
    tile_ends: list[int] = []
    for member, end in enumerate(bitmap.ends):
        for first in range(bitmap.columns(member)[0], end, step):
            last = min(first + step, end)
            part = values[int(bitmap.starts[first]) : int(bitmap.starts[last])]
            mask, count, padded = _chunk(bitmap.mask[first:last], part, bitmap.n_atoms, n_slabs)
            masks.append(mask)
            units.append(count)
            stored.append(padded)
            columns += range(first, last, TILE)
        tile_ends.append(len(columns))
    counts = torch.cat(units)
    offsets = functional.pad(counts.cumsum(0), (1, 0))
    if int(offsets[-1]) > torch.iinfo(torch.int32).max:
        raise ValueError(f"{int(offsets[-1]) * ALIGNMENT} bytes of values are more than a group of layers can have")
    return Slabs(
        n_atoms=bitmap.n_atoms,
        ends=bitmap.ends,
        tile_ends=tuple(tile_ends),
        masks=torch.cat(masks),
        values=torch.cat([*stored, stored[0].new_zeros(ALIGNMENT)]),  # not empty, so that it has an address
        value_bytes=values.element_size(),
        offsets=offsets.to(torch.int32),
        columns=torch.tensor([*columns, bitmap.out_features], dtype=torch.int32, device=bitmap.mask.device),
        scales=bitmap.scales,
        largest=int(counts.max()) * ALIGNMENT,
    )


def _chunk(mask: Tensor, values: Tensor, n_atoms: int, n_slabs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Repack some columns: the masks of their slabs, the units of values of each, and the values as bytes."""
    support = unpack_bits(mask, n_atoms)
    entries = values.new_zeros(support.shape).masked_scatter_(support, values)
    bits, entries = _ordered(support, n_slabs), _ordered(entries, n_slabs)
    counts = bits.sum(dim=1)
    per_unit = ALIGNMENT // values.element_size()
    units = (counts + per_unit - 1) // per_unit
    # A value's place is its rank among all values plus the padding of the slabs before its own.
    padding = (units.cumsum(0) - units) * per_unit - (counts.cumsum(0) - counts)
    places = torch.arange(values.numel(), device=values.device) + padding.repeat_interleave(counts)
    padded = values.new_zeros(int(units.sum()) * per_unit)
    padded[places] = entries[bits]
    words = pack_bits(bits).view(torch.int32)
    return words.reshape(-1, n_slabs, 32), units, padded.view(torch.uint8)


def _ordered(rows: Tensor, n_slabs: int) -> Tensor:
    """Pad the transpose of a part of S and order it as slabs: shape (n_tiles * n_slabs, 1024)."""
    n_columns, n_atoms = rows.shape
    rows = functional.pad(rows, (0, n_slabs * SLAB_ATOMS - n_atoms, 0, -n_columns % TILE))
    n_tiles = rows.shape[0] // TILE
    split = rows.reshape(n_tiles, 2, 8, n_slabs, 4, 4, 4)
    return split.permute(0, 3, 5, 1, 2, 4, 6).reshape(n_tiles * n_slabs, TILE * SLAB_ATOMS)


@dataclass(frozen=True)
class Rows:
    """D with atoms as rows.

    Attributes
    ----------
    values : Tensor, shape (n_atoms, row_length), 16-bit floating or int8
        Zero beyond in_features; rows are whole units of 16 bytes.  It is the stored tensor itself where that fits.
    scales : Tensor, shape (n_atoms,), float32, or None
    in_features : int
    """

    values: Tensor
    scales: Tensor | None
    in_features: int

    @property
    def n_atoms(self) -> int:
        """Number of atoms."""
        return self.values.shape[0]

    @property
    def row_length(self) -> int:
        """The length that rows of x must have for the kernels."""
        return self.values.shape[1]


def rows_of(dictionary: PackedDictionary, device: torch.device, dtype: torch.dtype) -> Rows:
    """Bring a dictionary to a device; values that are not int8 are rounded to a 16-bit dtype."""
    values = dictionary.values.detach().to(device)
    values = (values if values.dtype == torch.int8 else values.to(dtype)).contiguous()
    in_features = values.shape[1]
    padding = -in_features % (ALIGNMENT // values.element_size())
    if padding:
        values = functional.pad(values, (0, padding))
    elif values.data_ptr() % ALIGNMENT:
        values = values.clone()
    return Rows(values, None if dictionary.scales is None else dictionary.scales.detach().to(device), in_features)
