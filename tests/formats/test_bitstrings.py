"""Strings of bits against Python's big integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError
from cospadi.formats.bitstrings import check_strings, pack_strings, string_bytes, unpack_strings

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, 14)
DTYPES = {1: torch.bool, 14: torch.int32}


@given(st.sampled_from(WIDTHS), st.integers(0, 3), st.integers(0, 70), st.integers(0, 2**31))
@settings(max_examples=300, deadline=None)
def test_rows_are_the_digits_of_a_number_and_are_read_back(bits, n_rows, n, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n_rows, n), generator=generator)
    strings = pack_strings(codes.to(DTYPES.get(bits, torch.uint8)), bits)
    assert (strings.shape, strings.dtype) == ((n_rows, string_bytes(n, bits)), torch.uint8)
    assert strings.is_contiguous()
    for row, string in zip(codes.tolist(), strings.tolist(), strict=True):
        number = sum(code << bits * place for place, code in enumerate(row))
        assert bytes(string) == number.to_bytes((n * bits + 7) // 8, "little")
    assert torch.equal(unpack_strings("numbers", strings, n, bits).long(), codes)
    assert torch.equal(unpack_strings("numbers", strings.T.contiguous().T, n, bits).long(), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_bit_beyond_the_last_number_is_looked_at(bits):
    for n in range(1, 18):
        strings = pack_strings(torch.full((2, n), 2**bits - 1), bits)
        check_strings("numbers", strings, n, bits)
        for padding in range(n * bits, 8 * strings.shape[1]):
            damaged = strings.clone()
            damaged[1, padding // 8] |= 1 << padding % 8
            for read in (check_strings, unpack_strings):
                with pytest.raises(CheckpointError, match="numbers: padding bits"):
                    read("numbers", damaged, n, bits)
