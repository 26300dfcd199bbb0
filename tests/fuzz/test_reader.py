"""Whatever bytes a checkpoint holds, the reader gives the tensors or a CheckpointError, within memory and time."""

import itertools
import json
import random
import shutil
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError
from cospadi.files.untrusted import one_line, parse_object, shown
from cospadi.formats.checkpoint import INDEX, SINGLE
from cospadi.formats.headers import read_header, read_headers
from cospadi.formats.packing import unpack_group
from cospadi.formats.verify import read_config, read_tensors, verify_checkpoint

from .folders import mutate_folder
from .seeds import all_kinds, fuzz_inputs, small_checkpoint
from .targets import MEMORY_CONSTANT, MEMORY_FACTOR, TARGETS, Reader, mutated


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return fuzz_inputs(tmp_path_factory.mktemp("seeds"))


@pytest.fixture
def reader(tmp_path):
    return Reader(tmp_path / "reader")


def test_every_target_accepts_what_it_begins_with(reader, inputs):
    assert {data[0] for data in inputs} == set(range(len(TARGETS)))
    for data in inputs:
        if TARGETS[data[0]] not in (Reader.coefficients, Reader.dictionary):
            before = reader.accepted
            reader.run(data)
            assert reader.accepted == before + 1, data[:200]


def test_mutations_change_inputs_and_reach_beyond_the_parser(reader, inputs):
    rng = random.Random(0)
    changed = accepted = 0
    for _ in range(500):
        data = rng.choice([one for one in inputs if TARGETS[one[0]] not in (Reader.coefficients, Reader.dictionary)])
        new = mutated(data, rng)
        if new is not None and new != data:
            changed += 1
            before = reader.accepted
            reader.run(new)
            accepted += reader.accepted - before
    assert changed > 300
    assert 10 < accepted < changed // 2


@given(seed=st.integers(0, 2**32), times=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_changed_values_are_refused_or_harmless(inputs, tmp_path_factory, seed, times):
    rng = random.Random(seed)
    data = rng.choice(inputs)
    for _ in range(times):
        data = mutated(data, rng) or data
    folder = tmp_path_factory.mktemp("reader")
    Reader(folder / "files").run(data)
    shutil.rmtree(folder)


@given(target=st.integers(0, len(TARGETS) - 1), data=st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
def test_any_bytes_are_refused_or_harmless(tmp_path_factory, target, data):
    folder = tmp_path_factory.mktemp("reader")
    Reader(folder / "files").run(bytes([target]) + data)
    shutil.rmtree(folder)


KINDS = st.sampled_from(all_kinds())


@given(kind=KINDS, data=st.data())
@settings(max_examples=120, deadline=None)
def test_changed_files_give_the_same_tensors_or_an_error_or_finite_numbers(tmp_path_factory, kind, data):
    """Without checksums numbers may become other numbers, but never of another shape, nor what is not finite."""
    folder = tmp_path_factory.mktemp("file") / "model"
    small_checkpoint(folder, kind[0], kind[1], output=kind[2])
    content = (folder / SINGLE).read_bytes()
    place = data.draw(st.integers(0, len(content)))
    how = data.draw(st.sampled_from(["flip", "cut", "insert", "twice", "drop"]))
    few = data.draw(st.binary(min_size=1, max_size=9))
    changed = {
        "flip": content[:place] + few + content[place + len(few) :],
        "cut": content[:place],
        "insert": content[:place] + few + content[place:],
        "twice": content + content[place:],
        "drop": content[:place] + content[place + len(few) :],
    }[how]
    before = read_tensors(folder)
    (folder / SINGLE).write_bytes(changed)
    try:
        spec = verify_checkpoint(folder).groups[0]
    except CheckpointError:
        pass
    else:
        after = read_tensors(folder)
        assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
            name: (t.shape, t.dtype) for name, t in before.items()
        }
        factors = unpack_group(spec, after)
        assert all(bool(torch.isfinite(part).all()) for part in (factors.dictionary, *factors.coefficients.values()))
    shutil.rmtree(folder.parent)


def test_mutated_folders_are_refused_or_read(tmp_path):
    folders = [small_checkpoint(tmp_path / f"{n}", *kind[:2], output=kind[2]) for n, kind in enumerate(all_kinds()[:8])]
    folders.append(small_checkpoint(tmp_path / "shards", shards=2))
    outcomes, names = Counter(), set()
    for number in range(300):
        rng = random.Random(number)
        folder, mutations = mutate_folder(rng.choice(folders), tmp_path / "mutated", rng, folders)
        names.update(mutations)
        text = ""
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            text = str(error)
        assert not text or text.isprintable()
        outcomes["refused" if text else "read"] += 1
        shutil.rmtree(folder)
    assert outcomes["read"] > 20 < outcomes["refused"]
    assert len(names) > 10
    for folder in folders:
        verify_checkpoint(folder)  # the originals, which share files with the copies, are as they were


def write_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


U8 = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
HEADERS = {
    "lists without end": b"[" * 100_000,
    "mappings without end": b'{"a":' * 50_000,
    "lists that end, too deep": b'{"a":' + b"[" * 500 + b"]" * 500 + b"}",
    "a number of too many digits": b'{"a": ' + b"9" * 5000 + b"}",
    "NaN for a side": b'{"a": {"dtype": "U8", "shape": [NaN], "data_offsets": [0, 1]}}',
    "infinity for an offset": b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, Infinity]}}',
    "true for a side": {"a": {**U8, "shape": [True]}},
    "a side below zero": {"a": {**U8, "shape": [-1], "data_offsets": [1, 0]}},
    "minus zero": b'{"a": {"dtype": "U8", "shape": [-0.0], "data_offsets": [0, 0]}}',
    "sides whose product is small modulo 2^64": {"a": {**U8, "shape": [2**32, 2**32, 1]}},
    "a name twice": b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}',
    "half a surrogate pair for a name": {"\ud800": U8},
    "an escape sequence for a name": {"\x1b[2J": U8},
    "a very long name": {"x" * 100_000: U8},
    "a very long dtype": {"a": {**U8, "dtype": "x" * 100_000}},
    "a deep dtype": {"a": {**U8, "dtype": [[[[]]]]}},
    "metadata that is no mapping": {"__metadata__": 1, "a": U8},
    "metadata of numbers": {"__metadata__": {"format": 1}, "a": U8},
    "tensors that overlap": {"a": U8, "b": U8},
    "tensors with a gap": {"a": {**U8, "data_offsets": [1, 2]}},
    "offsets beyond the file": {"a": {**U8, "shape": [2], "data_offsets": [0, 2]}},
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers_of_known_tricks_are_refused_in_one_line(tmp_path, what):
    write_file(tmp_path / SINGLE, HEADERS[what], b"\0")
    with pytest.raises(CheckpointError) as caught:
        read_header(tmp_path / SINGLE)
    assert SINGLE in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_tensors_without_numbers_may_share_a_place(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [1, 1]}
    write_file(tmp_path / SINGLE, {"a": U8, "b": empty, "c": empty}, b"\0")
    assert set(read_header(tmp_path / SINGLE)) == {"a", "b", "c"}
    assert read_tensors(tmp_path)["c"].shape == (0, 5)


@pytest.mark.parametrize("name", ["\ud800", "x" * 5000, "\x1b[2J", "\n", ".", "a/../b"])
def test_file_names_of_an_index_that_no_file_can_have(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as caught:
        read_headers(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("key", ["format", "backend", "quant_method", "format_version", "groups"])
def test_a_description_of_long_texts_is_refused_in_one_line(tmp_path, key):
    folder = small_checkpoint(tmp_path / "model")
    data = json.loads((folder / "config.json").read_text())
    where = data["quantization_config"] if key != "format" else data["quantization_config"]["groups"][0]
    where[key] = ["\x1b[2J" * 100_000]
    (folder / "config.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000 + len(str(folder))


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'{"a":0},', b'"ab",', b"1e9,", b"[[]],"])
def test_memory_for_json_is_bounded_by_its_length(tmp_path, unit):
    data = b'{"a": [' + unit * (2**20 // len(unit)) + b"0]}"
    write_file(tmp_path / SINGLE, data)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            read_header(tmp_path / SINGLE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MEMORY_FACTOR * len(data) + MEMORY_CONSTANT // 32


def test_reading_needs_no_more_memory_than_the_file(tmp_path):
    """Sizes of 2^32 entries in every place that a file can name them, in a process that may not have much more."""
    resource = pytest.importorskip("resource")
    assert resource.RLIMIT_AS
    number = itertools.count()
    for format, value_dtype in (("bitmask", "bfloat16"), ("csr", "int8"), ("dense", "int4"), ("identity", "none")):
        for sizes in ((2**24, 2**8, 2**8), (2**8, 2**24, 2**8), (2**8, 2**8, 2**24), (2**16, 2**16, 2**16)):
            atoms = "int2g32" if format == "identity" else "int8"
            folder = small_checkpoint(tmp_path / f"{next(number)}", format, f"{value_dtype} with {atoms}")
            data = json.loads((folder / "config.json").read_text())
            group = data["quantization_config"]["groups"][0]
            group |= {"n_atoms": sizes[1], "in_features": sizes[0]}
            outputs = sizes[1] if format == "identity" else sizes[2]
            for member in group["members"]:
                member |= {"out_features": outputs, "n_stored": 0 if format == "identity" else sizes[1] * outputs}
            (folder / "config.json").write_text(json.dumps(data))
    code = """
import resource, sys
from pathlib import Path
from cospadi.errors import CheckpointError
from cospadi.formats.base import FORMATS
from cospadi.formats.verify import verify_checkpoint
for name in ("bitmask", "csr", "dense", "identity"):
    FORMATS.create(name)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        print("refused")
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * next(number), done.stderr


def test_objects_nest_as_deep_as_is_allowed(tmp_path):
    def nested(depth):
        return b'{"a":' * depth + b"0" + b"}" * depth

    assert parse_object(tmp_path, nested(32))
    with pytest.raises(CheckpointError, match="deep"):
        parse_object(tmp_path, nested(33))


def test_what_is_shown_is_short_and_printable():
    assert shown("a") == "'a'"
    assert shown("\ud800\x1b\n").isprintable()
    assert len(shown(["x" * 1000])) < 200
    assert one_line("a\nb\x1b[2J") == "a b?[2J"
    assert len(one_line("x" * 10**6)) < 1000
