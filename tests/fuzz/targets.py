"""What is done with the bytes that a fuzzer makes: parts of the reader, which may refuse them but nothing else.

An input is the number of a target and what that target reads.  Nothing here imports transformers, and a run of a
target takes little more than the reader itself.
"""

import itertools
import json
import math
import random
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cospadi_cli.commands.inspect import inspect_checkpoint

from cospadi.errors import CheckpointError
from cospadi.formats.base import FORMATS, PackedCoefficients
from cospadi.formats.checkpoint import INDEX, SINGLE, CheckpointConfig
from cospadi.formats.checksums import CHECKSUMS, check_checksums
from cospadi.formats.dictionary import (
    DICTIONARY_DTYPES,
    dictionary_layout,
    pack_dictionary,
    packed_dictionary,
    unpack_dictionary,
)
from cospadi.formats.factorization import GroupSpec, MemberSpec
from cospadi.formats.headers import read_header, read_headers
from cospadi.formats.packing import unpack_group
from cospadi.formats.verify import read_config, read_tensors, verify_checkpoint

MEMORY_FACTOR, MEMORY_CONSTANT = 64, 32 * 2**20
"""Bytes of memory per byte of input, and besides, that reading may take: Python's own objects for parsed JSON."""

MOST_CHARACTERS = 4000
"""Of an error's text."""

_MOST_ENTRIES = 2**20
_PAIRS = [(name, dtype) for name in ("bitmask", "csr", "dense") for dtype in FORMATS.create(name).value_dtypes]
_GROUPED = [dtype for dtype in DICTIONARY_DTYPES if dtype != "none"]


class Reader:
    """Runs inputs in a folder, which should be in memory.

    ``run`` raises what the reader must not: anything but CheckpointError, or AssertionError where two ways of reading
    disagree or memory is taken that the input does not justify.
    """

    def __init__(self, folder: Path) -> None:
        self.whole, self.shards, self.reported = folder / "whole", folder / "shards", folder / "reported"
        for path in (self.whole, self.shards, self.reported):
            path.mkdir(parents=True)
        self.accepted = self.refused = 0
        for number, name in enumerate(("a", "b"), start=1):
            header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
            file = struct.pack("<Q", len(header)) + header + b"\0"
            (self.shards / f"model-{number:05d}-of-00002.safetensors").write_bytes(file)
        (self.reported / "config.json").write_text(json.dumps({"quantization_config": _described()}))

    def run(self, data: bytes) -> None:
        """Give an input to its target."""
        if not data:
            return
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        text = ""
        try:
            TARGETS[data[0] % len(TARGETS)](self, data[1:])
            self.accepted += 1
        except CheckpointError as error:
            text = str(error)
            self.refused += 1
        assert len(text) < MOST_CHARACTERS, f"an error of {len(text)} characters"
        assert not text or text.isprintable(), f"an error that is not one clear line: {text!r}"
        unit = 1 if sys.platform == "darwin" else 1024
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
        assert taken <= MEMORY_FACTOR * len(data) + MEMORY_CONSTANT, f"{taken} bytes for an input of {len(data)}"

    def configuration(self, data: bytes) -> None:
        (self.whole / "config.json").write_bytes(b'{"quantization_config": ' + data + b"}")
        config = read_config(self.whole)
        assert CheckpointConfig.from_dict(config.to_dict()) == config

    def header(self, data: bytes) -> None:
        path = self.whole / SINGLE
        path.write_bytes(data)
        stored = read_header(path)
        total = sum(math.prod(one.shape) * one.dtype.itemsize for one in stored.values())
        assert total <= len(data)

    def index(self, data: bytes) -> None:
        (self.shards / INDEX).write_bytes(data)
        assert set(read_headers(self.shards)) <= {"a", "b"}

    def checksums(self, data: bytes) -> None:
        (self.shards / INDEX).unlink(missing_ok=True)
        (self.shards / CHECKSUMS).write_bytes(data)
        try:
            assert check_checksums(self.shards)
        finally:
            (self.shards / CHECKSUMS).unlink()

    def report(self, data: bytes) -> None:
        (self.reported / "report.json").write_bytes(data)
        shown = inspect_checkpoint(self.reported)
        assert shown["groups"][0]["bytes"] > 0

    def checkpoint(self, data: bytes) -> None:
        length = int.from_bytes(data[:4], "little")
        (self.whole / "config.json").write_bytes(data[4 : 4 + length])
        (self.whole / SINGLE).write_bytes(data[4 + length :])
        config = verify_checkpoint(self.whole, checksums=False)
        tensors = read_tensors(self.whole)
        for group in config.groups:
            if all(math.prod(group.coefficients_shape(member)) <= _MOST_ENTRIES for member in group.members):
                factors = unpack_group(group, tensors)
                parts = (factors.dictionary, *factors.coefficients.values())
                assert all(bool(torch.isfinite(part).all()) for part in parts)

    def coefficients(self, data: bytes) -> None:
        if len(data) < 4:
            return
        format, value_dtype = _PAIRS[data[0] % len(_PAIRS)]
        n_atoms, out_features, n_stored = data[1] + 1, data[2] + 1, data[3]
        codec = FORMATS.create(format)
        layout = codec.layout(n_atoms, out_features, n_stored, value_dtype)
        packed = PackedCoefficients(format, n_atoms, out_features, value_dtype, _filled(layout, data[4:]))
        refused = None
        try:
            codec.check(packed)
        except CheckpointError as error:
            refused = error
        try:
            found = codec.unpack(packed)
        except CheckpointError:
            assert refused is not None, "unpack refuses what check accepts"
            raise
        assert refused is None, "check refuses what unpack accepts"
        assert found.shape == (n_atoms, out_features)
        gathered = codec.gather(packed, found)
        assert codec.gather(packed, torch.zeros_like(found)).shape == gathered.shape
        assert int(gathered.count_nonzero()) == int(found.count_nonzero())

    def dictionary(self, data: bytes) -> None:
        if len(data) < 3:
            return
        dtype, n_atoms, in_features = _GROUPED[data[0] % len(_GROUPED)], data[1] + 1, data[2] + 1
        tensors = _filled(dictionary_layout(n_atoms, in_features, dtype), data[3:])
        packed = packed_dictionary(tensors, n_atoms, in_features, dtype)
        found = unpack_dictionary(packed)
        assert found.shape == (n_atoms, in_features)
        if packed.scales is not None:
            again = pack_dictionary(found.T, dtype, packed.scales)
            assert torch.equal(again.values, packed.values), "packing again gives other numbers"


TARGETS: tuple[Callable[[Reader, bytes], None], ...] = (
    Reader.configuration,
    Reader.header,
    Reader.index,
    Reader.checksums,
    Reader.checkpoint,
    Reader.coefficients,
    Reader.dictionary,
    Reader.report,
)


def _described() -> dict[str, Any]:
    """Give the description of one small group."""
    member = MemberSpec("block.q", 6, 33)
    group = GroupSpec(5, 11, (member,), "bitmask", "bfloat16", "bfloat16", True, "input")
    return CheckpointConfig((group,)).to_dict()


def _filled(layout: dict[str, tuple[tuple[int, ...], torch.dtype]], data: bytes) -> dict[str, torch.Tensor]:
    """Take the tensors of a layout from bytes, one after the other, and zeros where these end."""
    tensors = {}
    for name, (shape, dtype) in layout.items():
        size = math.prod(shape) * dtype.itemsize
        part, data = bytearray(data[:size].ljust(size, b"\0")), data[size:]
        tensors[name] = torch.frombuffer(part, dtype=dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)
    return tensors


# --- mutations that know where the JSON is

_NUMBERS = (0, -1, 1, 2, 7, 255, 2**15, 2**24, 2**31, 2**32, 2**48, 2**63, 2**64, 10**400, -0.0, 1.5, 1e308)
_TEXTS = (
    *("", "0", "\ud800", "x" * 300, "../x", "a..b", "\0", "\x1b[2J", "input", "output", "identity", "none"),
    *dict.fromkeys(itertools.chain(*_PAIRS, DICTIONARY_DTYPES)),
    *("BOOL", "U8", "I8", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "I64", "F64", "quant_method", "__metadata__"),
)
_VALUES: tuple[Any, ...] = (*_NUMBERS, float("nan"), float("inf"), None, True, False, [], {}, [[]], {"": 0}, *_TEXTS)


def mutated(data: bytes, rng: random.Random) -> bytes | None:
    """Change a value of the JSON that an input holds; None where there is none to change."""
    target = TARGETS[data[0] % len(TARGETS)] if data else None
    before, text, after = data[:1], data[1:], b""
    length = ""  # how that of the text is stored before it
    if target is Reader.checkpoint:
        size = int.from_bytes(data[1:5], "little")
        before, text, after, length = data[:1], data[5 : 5 + size], data[5 + size :], "<I"
    if target is Reader.header or (after and rng.random() < 0.5):
        before = data[: len(data) - len(after or text)]
        size = int.from_bytes(data[len(before) : len(before) + 8], "little")
        start = len(before) + 8
        text, after, length = data[start : start + size], data[start + size :], "<Q"
    try:
        text = _changed(text, rng)
    except (ValueError, RecursionError):
        return None
    return before + (struct.pack(length, len(text)) if length else b"") + text + after


def _changed(text: bytes, rng: random.Random) -> bytes:
    """Change a value somewhere in a JSON text.

    Raises
    ------
    ValueError
        It is none.
    """
    places: list[tuple[Any, Any]] = []
    root = [json.loads(text)]
    level = [root]
    while level:
        inside = [(one, key) for one in level for key in (one if isinstance(one, dict) else range(len(one)))]
        places += inside
        level = [one[key] for one, key in inside if isinstance(one[key], dict | list)]
    for _ in range(rng.choice((1, 1, 2, 4))):
        one, key = rng.choice(places)
        if key not in one if isinstance(one, dict) else key >= len(one):
            continue  # an earlier change has taken it away
        other, other_key = rng.choice(places)
        how = rng.randrange(6)
        if how == 0:
            one[key] = rng.choice(_VALUES)
        elif how == 1 and isinstance(one[key], int):
            one[key] += rng.choice((-1, 1, 2, 8, one[key]))
        elif how == 2 and one is not root:
            del one[key]
        elif how == 3 and (other_key in other if isinstance(other, dict) else other_key < len(other)):
            one[key] = json.loads(json.dumps(other[other_key]))
        elif how == 4 and isinstance(one, list) and one is not root:
            one.insert(key, json.loads(json.dumps(one[key])))
        elif isinstance(one, dict):
            one[rng.choice((*_TEXTS, *one))] = one.pop(key)
    return json.dumps(root[0]).encode()
