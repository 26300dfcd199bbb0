"""Runs the C kernels on tensors that end, or begin, where the readable memory does; started by test_cpu.py.

A load beyond a tensor is then a segmentation fault, which is why this is a program of its own.  With kernels that were
compiled with a sanitizer it finds besides what reads or writes beyond the memory that torch has given out.

    python -m tests.backends.kernel_checks [plain|sanitized] [sound|planted]

``planted`` tells the kernels that no column needs the copies with room behind, so that they read too far.
"""

import ctypes
import itertools
import mmap
import sys
from dataclasses import replace

import torch

from cospadi.backends.base import Placement
from cospadi.backends.cpu import library
from cospadi.backends.cpu.runtime import CpuBackend
from cospadi.formats.base import PackedCoefficients, PackedDictionary
from tests.backends.backend_cases import CPU, Case, check_product, quantised

PAGE = mmap.PAGESIZE
# n_atoms, in_features, widths, density; the last is large enough for several threads
SIZES = [
    (1, 1, (1,), 1.0),
    (7, 3, (2, 1), 0.5),
    (31, 33, (3,), 0.5),
    (64, 64, (8,), 1.0),
    (65, 63, (9,), 0.03),
    (130, 129, (17, 3), 0.5),
    (130, 129, (17, 3), 0.03),
    (530, 300, (71, 60), 0.5),
]
STORED = [
    (torch.bfloat16, "bfloat16"),
    (torch.float16, "float16"),
    (torch.float32, "float32"),
    (torch.float16, "int8"),
    (torch.float32, "int8"),
    (torch.float32, "bfloat16"),
]
_regions = []


def fenced(tensor, at_end):
    """Copy a tensor to memory of its own, right before (or after) a page that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    room = -(-size // PAGE) * PAGE
    region = mmap.mmap(-1, room + 2 * PAGE)
    _regions.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for fence in (start, start + PAGE + room):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(PAGE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (room - size if at_end else 0)
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape)
    return copy.copy_(tensor)


def fenced_case(case, at_end):
    """Give dictionary, members and input of a case in fenced memory."""
    stored = case.dictionary()
    dictionary = PackedDictionary(
        fenced(stored.values, at_end), None if stored.scales is None else fenced(stored.scales, at_end)
    )
    members = [
        PackedCoefficients(
            p.format, p.n_atoms, p.out_features, p.value_dtype, {n: fenced(t, at_end) for n, t in p.tensors.items()}
        )
        for p in case.members()
    ]
    return dictionary, members, fenced(case.x(), at_end)


def cases():
    """Layers with coefficients, and layers that are only quantised."""
    for (dtype, value_dtype), (n_atoms, in_features, widths, density) in itertools.product(STORED, SIZES):
        yield Case(9, n_atoms, in_features, widths, density, dtype, value_dtype=value_dtype)
        if density != 0.03:
            yield quantised(n_atoms, value_dtype, n_tokens=9, in_features=in_features, dtype=dtype)


def main(build, faults):
    if build == "sanitized":
        # The sanitizer's flags stand in CC; optimising with them would take a minute.
        library._FLAGS = tuple(flag for flag in library._FLAGS if not flag.startswith("-O"))
    checked = 0
    for case in cases():
        torch.set_num_threads(2 if case.n_atoms > 500 else 1)
        dtype = case.dtype
        D, S = case.stored()
        for at_end in (True, False):
            dictionary, members, x = fenced_case(case, at_end)
            identity = torch.eye(case.n_atoms, dtype=D.dtype)
            z = fenced(replace(case, in_features=case.n_atoms).x(), at_end)
            for level, most in itertools.product(library.levels(), (99, 0)):
                backend, placement = CpuBackend(instructions=level, max_tokens=most), Placement(CPU, dtype)
                d = backend.prepare_dictionary(dictionary, placement)
                c = backend.prepare_coefficients(members, placement)
                if faults == "planted":
                    for struct in c.structs:
                        struct.tail = struct.out_features
                products = [(d, x, D), (None, z, identity)] if c.structs else [(d, x, D)]
                for n_tokens, (atoms, inputs, factor) in itertools.product((1, 2, 4, 9) if most else (1,), products):
                    part = inputs[inputs.shape[0] - n_tokens :] if at_end else inputs[:n_tokens]
                    check_product(part, factor, S, backend.multiply(atoms, c, part, None))
                    checked += 1
    print(f"{checked} products of {', '.join(library.levels())} are right")


if __name__ == "__main__":
    main(*sys.argv[1:])
