"""Which kernels run, with which grids and arguments: plain data, the same for the GPU and for its emulation."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.backends.cuda.layout import TILE, Rows, Slabs

WARP = 32
STAGES = 3
"""Slabs of a warp in shared memory, as in kernels.cu."""
SHARED_LIMIT = 96 * 1024
"""Bytes of shared memory that a block may ask for on every architecture from sm_80 on."""
PROJECT_TOKENS = (8, 16)
"""Tokens of a block of the kernels for x D."""
COMBINE_TOKENS = {8: (1, 16), 16: (2, 16), 32: (4, 8), 64: (4, 8)}
"""For the kernels of z S, by tokens of a block: tiles of columns side by side in the block, and most warps."""

_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
_WARPS_WANTED = 12
"""Warps per multiprocessor that keep enough loads in flight.  Computed by Little's law, not measured: with two slabs of
1.1 KB each, or 4 KB of D, they load more than the 20 KB that the fastest memories need."""
_WARPS_TOO_FEW = 3
"""With fewer warps per multiprocessor, sums are split over blocks.  Below this number a fast memory has less than a
third of the loads that it needs in flight; splitting costs the launch of a second kernel.  Computed, not measured."""
_MOST_SPLITS = 8


@dataclass(frozen=True)
class Launch:
    """One kernel and what it is started with."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: tuple[Tensor | int | None, ...]


def run(module: Any, launches: Iterable[Launch]) -> None:
    """Start kernels of a module one after the other."""
    for launch in launches:
        module.kernel(launch.kernel).launch(launch.grid, launch.block, launch.shared_bytes, launch.args)


def kernels() -> Iterator[str]:
    """Name all kernels of kernels.cu."""
    yield from kernels_with_much_shared_memory()
    for name in _TYPES.values():
        yield f"finish_{name}"
        for bits in (16, 8):
            yield f"densify_{name}_{bits}"
            yield from (f"project_{name}_{bits}_{tokens}" for tokens in PROJECT_TOKENS)


def kernels_with_much_shared_memory() -> Iterator[str]:
    """Name the kernels whose blocks may need more shared memory than a kernel has without asking."""
    for name in _TYPES.values():
        for bits in (16, 8):
            yield from (f"combine_{name}_{bits}_{tokens}" for tokens in COMBINE_TOKENS)


def project(rows: Rows, x: Tensor, z: Tensor, n_processors: int) -> Iterator[Launch]:
    """Give z = x D for few tokens.

    Parameters
    ----------
    rows : Rows
    x : Tensor, shape (n_tokens, rows.row_length), 16-bit floating
        Zero beyond in_features.
    z : Tensor, shape (n_tokens, padded_atoms)
        Written; zero beyond n_atoms.
    n_processors : int
        Multiprocessors of the GPU.
    """
    n_tokens, width = z.shape
    tokens = next((t for t in PROJECT_TOKENS if t >= n_tokens), PROJECT_TOKENS[-1])
    tiles, groups = width // TILE, -(-n_tokens // tokens)
    bits = 8 * rows.values.element_size()
    n_chunks = -(-rows.row_length // (32 if bits == 16 else 64))
    warps, splits = _spread(tiles * groups, 1, 16, n_chunks, n_processors)
    partial = z.new_empty((splits, n_tokens, width), dtype=torch.float32) if splits > 1 else None
    row_bytes = rows.row_length * rows.values.element_size()
    yield Launch(
        f"project_{_TYPES[z.dtype]}_{bits}_{tokens}",
        (tiles, groups, splits),
        (warps * WARP, 1, 1),
        warps * TILE * tokens * 4,
        (rows.values, rows.scales, x, z, partial, n_tokens, rows.n_atoms, width, rows.row_length, row_bytes),
    )
    if partial is not None:
        yield _finish(partial, rows.scales, z, rows.n_atoms)


def combine(slabs: Slabs, z: Tensor, y: Tensor, member: int | None, n_processors: int) -> Iterator[Launch]:
    """Give y = z S for few tokens.

    Parameters
    ----------
    slabs : Slabs
    z : Tensor, shape (n_tokens, padded_atoms), 16-bit floating
    y : Tensor, shape (n_tokens, out_features of the member or of all)
        Written.
    member : int or None
    n_processors : int
        Multiprocessors of the GPU.
    """
    n_tokens, width = y.shape
    tokens = next((t for t in COMBINE_TOKENS if t >= n_tokens), max(COMBINE_TOKENS))
    side, most = COMBINE_TOKENS[tokens]
    first, last = slabs.tiles_of(member)
    n_slabs = slabs.masks.shape[1]
    stage = _stage_bytes(slabs)
    most = min(most, SHARED_LIMIT // (STAGES * stage))
    blocks, groups = -(-(last - first) // side), -(-n_tokens // tokens)
    warps, splits = _spread(blocks * groups, side, most, n_slabs, n_processors)
    partial = y.new_empty((splits, n_tokens, width), dtype=torch.float32) if splits > 1 else None
    scales = _scales(slabs, member)
    yield Launch(
        f"combine_{_TYPES[y.dtype]}_{8 * slabs.value_bytes}_{tokens}",
        (blocks, groups, splits),
        (warps * WARP, 1, 1),
        warps * max(STAGES * stage, TILE * tokens * 4),
        (
            *(slabs.masks, slabs.offsets, slabs.values, slabs.columns, scales, z, y, partial),
            *(n_slabs, first, last - first, stage, n_tokens, width),
        ),
    )
    if partial is not None:
        yield _finish(partial, scales, y, width)


def densify(slabs: Slabs, dense: Tensor, member: int | None) -> Iterator[Launch]:
    """Give the transpose of S with its zeros.

    Parameters
    ----------
    slabs : Slabs
    dense : Tensor, shape (out_features of the member or of all, padded_atoms), 16-bit floating
        Written.
    member : int or None
    """
    first, last = slabs.tiles_of(member)
    n_slabs, warps = slabs.masks.shape[1], 8
    stage = _stage_bytes(slabs)
    yield Launch(
        f"densify_{_TYPES[dense.dtype]}_{8 * slabs.value_bytes}",
        (last - first, -(-n_slabs // warps), 1),
        (warps * WARP, 1, 1),
        warps * stage,
        (
            *(slabs.masks, slabs.offsets, slabs.values, slabs.columns, _scales(slabs, member), dense),
            *(n_slabs, first, last - first, stage),
        ),
    )


def _stage_bytes(slabs: Slabs) -> int:
    """Give the room for a slab: mask, values, and 16 bytes because bytes are read in words beyond the last one."""
    return 4 * WARP + slabs.largest + 16


def _scales(slabs: Slabs, member: int | None) -> Tensor | None:
    if slabs.scales is None:
        return None
    first, last = slabs.columns_of(member)
    return slabs.scales[first:last]


def _spread(blocks: int, side: int, most: int, pieces: int, n_processors: int) -> tuple[int, int]:
    """Give the warps of a block and the blocks that share a sum.

    Warps are added first, because what they share is summed within the block; sums over blocks take a second kernel.

    Parameters
    ----------
    blocks : int
        Without shared sums.
    side : int
        Warps of a block that do not share sums.
    most : int
        Warps that a block can have.
    pieces : int
        That a sum can be cut into.
    n_processors : int
    """
    wanted = _WARPS_WANTED * n_processors
    sharing = 1
    while 2 * sharing * side <= most and 2 * sharing <= pieces:
        if sharing * side >= 4 and blocks * sharing * side >= wanted:
            break
        sharing *= 2
    splits = 1
    if blocks * sharing * side < _WARPS_TOO_FEW * n_processors:
        splits = min(wanted // (blocks * sharing * side), pieces // (2 * sharing), _MOST_SPLITS)
    return sharing * side, max(1, splits)


def _finish(partial: Tensor, scales: Tensor | None, out: Tensor, n_valid: int) -> Launch:
    splits, n_tokens, width = partial.shape
    return Launch(
        f"finish_{_TYPES[out.dtype]}",
        (-(-n_tokens * width // 256), 1, 1),
        (256, 1, 1),
        0,
        (partial, scales, out, splits, n_tokens, width, n_valid),
    )
