"""Whole numbers of any few bits as strings of bits, one after the other without gaps; see docs/format.md, section 5.

Number i of a row of b-bit numbers takes the bits b i to b i + b - 1 of the row's string, its lowest bit first; bit p
of the string is bit p % 8 (from the lowest) of byte p // 8.  A row is whole bytes; bits beyond its numbers are zero.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from cospadi.errors import CheckpointError


def string_bytes(count: int, bits: int) -> int:
    """Count the bytes of a string of ``count`` numbers."""
    return (count * bits + 7) // 8


def pack_strings(codes: Tensor, bits: int) -> Tensor:
    """Write every row of a matrix as a string of bits.

    Parameters
    ----------
    codes : Tensor, shape (n_rows, n), bool or integers
        From 0 to 2^bits - 1.
    bits : int
        Of a number, from 1 to 14.

    Returns
    -------
    Tensor, shape (n_rows, ceil(n * bits / 8)), uint8
        New.
    """
    n_rows, n = codes.shape
    together, dtype = _word(bits)
    n_words, step = -(-n // together), together * bits // 8
    codes = functional.pad(codes, (0, n_words * together - n)).reshape(n_rows, n_words, together)
    words = codes.new_zeros((n_rows, n_words), dtype=dtype)
    for place in range(together):
        words |= codes[:, :, place].to(dtype) << bits * place
    parts = words.view(torch.uint8).reshape(n_rows, n_words, dtype.itemsize)
    strings = parts[:, :, :step].reshape(n_rows, n_words * step)
    return strings[:, : string_bytes(n, bits)].clone(memory_format=torch.contiguous_format)


def unpack_strings(name: str, strings: Tensor, n: int, bits: int) -> Tensor:
    """Read the numbers of every row.

    Parameters
    ----------
    name : str
        Of the tensor, for error texts.
    strings : Tensor, shape (n_rows, ceil(n * bits / 8)), uint8
    n, bits : int
        Numbers of a row, and bits of a number, from 1 to 14.

    Returns
    -------
    Tensor, shape (n_rows, n)
        In the shortest integer dtype that the bits of some whole bytes of the string fit: uint8, int32 or int64.

    Raises
    ------
    CheckpointError
        Bits beyond the last number of a row are set.
    """
    check_strings(name, strings, n, bits)
    n_rows = strings.shape[0]
    together, dtype = _word(bits)
    n_words, step = -(-n // together), together * bits // 8
    strings = functional.pad(strings, (0, n_words * step - strings.shape[1]))
    parts = strings.new_zeros(n_rows, n_words, dtype.itemsize)
    parts[:, :, :step] = strings.reshape(n_rows, n_words, step)
    words = parts.reshape(-1).view(dtype).reshape(n_rows, n_words)
    numbers = words.new_empty(n_rows, n_words, together)
    for place in range(together):
        torch.bitwise_and(words >> bits * place, (1 << bits) - 1, out=numbers[:, :, place])
    return numbers.reshape(n_rows, n_words * together)[:, :n]


def check_strings(name: str, strings: Tensor, n: int, bits: int) -> None:
    """Refuse strings of n numbers, as ``unpack_strings`` takes them, with bits set beyond the last number.

    Raises
    ------
    CheckpointError
        There are such bits.
    """
    used = n * bits % 8
    if used and bool((strings[:, -1] >> used).any()):
        raise CheckpointError(f"{name}: padding bits beyond the last number are set")


def _word(bits: int) -> tuple[int, torch.dtype]:
    """Give how many numbers fill whole bytes together, and the integer dtype that holds those."""
    together = 8 // math.gcd(bits, 8)
    # At most 56 bits (8 numbers of 7 bits, or 4 of 14), or 24 of 32: the sign of the word is never among them.
    return together, torch.uint8 if together * bits == 8 else torch.int32 if together * bits <= 24 else torch.int64
