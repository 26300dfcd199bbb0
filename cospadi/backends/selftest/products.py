"""Comparison of products with float64, for odd shapes, supports from empty to full and many numbers of tokens."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from cospadi.backends.base import Backend, Placement
from cospadi.backends.selftest.examples import Example
from cospadi.backends.selftest.findings import Check, Findings, guarded, same_bits

ALLOWED = {torch.float32: 1e-5, torch.float16: 1.25e-3, torch.bfloat16: 1e-2}
"""Largest relative error ||y - y64|| / ||y64|| of a product.

In 16 bits z and y are rounded, and by some backends the D and S that int8 stands for: four times the rounding unit
(2^-11 and 2^-9), and a quarter more for sums that cancel.
"""

TOKENS = (0, 1, 2, 7, 8, 9, 16, 17, 64, 257, 513)
FEW_TOKENS = (0, 1, 2, 7, 8, 9, 17, 64)
"""Numbers of tokens around the limits of each kernel."""


def products(backend: Backend, placement: Placement, shown: Sequence[Example], tokens: Sequence[int]) -> Check:
    """Compare the products of a backend with float64; each runs twice and must give equal bits."""
    allowed = ALLOWED[placement.dtype]

    def run(findings: Findings) -> str:
        reasons = []
        for one in shown:
            refused = [state for packed in one.members if not (state := backend.supports(packed, placement))]
            if refused:
                reasons.append(refused[0].reason)
                continue
            dictionary, coefficients = prepared(backend, one, placement)
            members = [None, *range(len(one.members))] if len(one.members) > 1 else [None]
            for n_tokens, member in product(tokens, members):
                case = f"{one.name}, {n_tokens} tokens, layer {'all' if member is None else member}"
                x = one.inputs(n_tokens, placement)
                given = x.clone()
                spoil_memory(x, one)
                first = backend.multiply(dictionary, coefficients, x, member)
                second = backend.multiply(dictionary, coefficients, x, member)
                weight = one.weight(member)
                whole = (n_tokens, weight.shape[1])
                findings.require(tuple(first.shape) == whole, f"{case}: shape {tuple(first.shape)}")
                findings.require(first.dtype == placement.dtype, f"{case}: {first.dtype}")
                findings.require(first.is_contiguous(), f"{case}: not contiguous")
                if tuple(first.shape) == whole:
                    findings.compare(first, given.double() @ weight, allowed, case)
                findings.require(same_bits(first, second), f"{case}: other bits the second time")
                findings.require(same_bits(x, given), f"{case}: the input was changed")
        return reasons[0] if reasons and not findings.cases else ""

    name = f"product, {str(placement.dtype).removeprefix('torch.')}"
    return guarded(name, backend.name, allowed, run)


def prepared(backend: Backend, one: Example, placement: Placement) -> tuple[Any, Any]:
    """Let a backend prepare the dictionary, if there is one, and the coefficients."""
    dictionary = None if one.dictionary is None else backend.prepare_dictionary(one.dictionary, placement)
    return dictionary, backend.prepare_coefficients(one.members, placement)


def spoil_memory(x: Tensor, one: Example) -> None:
    """Leave NaN in the memory that torch allocates next, which shows entries that a kernel does not write."""
    sizes = {one.members[0].n_atoms, *(packed.out_features for packed in one.members)}
    sizes.add(sum(packed.out_features for packed in one.members))
    blocks = [
        torch.full((x.shape[0], size), torch.nan, dtype=dtype, device=x.device)
        for size, dtype in product(sizes, (x.dtype, torch.float32))
    ]
    del blocks
