"""Damaged and hostile checkpoint folders: each is refused by name, quickly and without memory."""

import json
import struct
import tracemalloc

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cospadi.errors import CheckpointError
from cospadi.formats.checkpoint import INDEX, CheckpointConfig
from cospadi.formats.headers import read_header
from cospadi.formats.packing import unpack_group
from cospadi.formats.verify import read_config, read_tensors, verify_checkpoint

from ..checkpoints import edit_config, random_group
from ..fuzz.seeds import small_checkpoint

SINGLE = "model.safetensors"
FEW_BYTES = 4 * 2**20


@pytest.fixture
def folder(tmp_path):
    return small_checkpoint(tmp_path / "model")


def refused(folder, *texts):
    """Expect a CheckpointError with these texts, in less memory than a few MiB."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    for text in texts:
        assert text in str(caught.value)
    assert peak < FEW_BYTES


def rewrite_header(path, change):
    """Apply a function to the parsed header of a safetensors file, leaving the data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("format", ["bitmask", "csr", "dense"])
@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8", "bfloat16 with int8", "float32 with int4g32"])
@pytest.mark.parametrize("shards", [1, 2])
def test_the_undamaged_checkpoint_is_accepted(tmp_path, format, value_dtype, shards):
    folder = small_checkpoint(tmp_path / "model", format, value_dtype, shards)
    assert [m.name for m in verify_checkpoint(folder).groups[0].members] == ["block.q", "block.k"]
    assert torch.equal(read_tensors(folder, ["norm.weight"])["norm.weight"], torch.ones(5))


# --- config.json


def description(change):
    return lambda data: change(data["quantization_config"])


CONFIGS = {
    "another version": (description(lambda q: q.update(format_version=2)), "format_version 2"),
    "a version that is no number": (description(lambda q: q.update(format_version="1")), "format_version '1'"),
    "a version that is true": (description(lambda q: q.update(format_version=True)), "format_version True"),
    "another method": (description(lambda q: q.update(quant_method="gptq")), "quant_method"),
    "an unknown key": (description(lambda q: q.update(trust=1)), "trust"),
    "a missing key": (description(lambda q: q.pop("experts")), "experts"),
    "groups that are no list": (description(lambda q: q.update(groups={})), "groups is not a list"),
    "an unknown format": (description(lambda q: q["groups"][0].update(format="pickle")), "unknown format 'pickle'"),
    "an unknown value dtype": (description(lambda q: q["groups"][0].update(value_dtype="int3")), "'int3'"),
    "a dtype that the format lacks": (
        description(lambda q: q["groups"][0].update(format="csr", value_dtype="bfloat14")),
        "bfloat14",
    ),
    "another dictionary dtype": (description(lambda q: q["groups"][0].update(dictionary_dtype="float64")), "'float64'"),
    "a dictionary dtype that is for values": (
        description(lambda q: q["groups"][0].update(dictionary_dtype="int4")),
        "'int4' is no dtype of a dictionary",
    ),
    "a value dtype that is for dictionaries": (
        description(lambda q: q["groups"][0].update(value_dtype="int4g32")),
        "'bitmask' does not store 'int4g32' values",
    ),
    "a format that no two layers share": (
        description(lambda q: q["groups"][0].update(format="identity", value_dtype="none")),
        "one layer in a group, found 2",
    ),
    "a layer named twice": (
        description(lambda q: q["groups"][0]["members"][1].update(name="block.q")),
        "block.q is named twice",
    ),
    "a group that comes twice": (description(lambda q: q["groups"].append(q["groups"][0])), "named twice"),
    "a name that is no module": (
        description(lambda q: q["groups"][0]["members"][0].update(name="block..q")),
        "not a module name",
    ),
    "an empty group": (description(lambda q: q["groups"][0].update(members=[])), "without members"),
    "no atoms": (description(lambda q: q["groups"][0].update(n_atoms=0)), "beyond what the format allows"),
    "absurd sizes": (description(lambda q: q["groups"][0].update(n_atoms=2**40)), "beyond what the format allows"),
    "absurd products": (
        description(lambda q: q["groups"][0].update(n_atoms=2**20, in_features=2**20)),
        "beyond what the format allows",
    ),
    "more coefficients than entries": (
        description(lambda q: q["groups"][0]["members"][0].update(n_stored=2**40)),
        "more coefficients than it has",
    ),
    "a negative size": (description(lambda q: q["groups"][0].update(in_features=-1)), "in_features=-1"),
    "a size that is no integer": (description(lambda q: q["groups"][0].update(in_features=5.0)), "in_features=5.0"),
    "no description": (lambda data: data.pop("quantization_config"), "quant_method"),
    "a description that is no mapping": (lambda data: data.update(quantization_config=[1]), "quant_method"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_bad_description_is_refused(folder, what):
    change, text = CONFIGS[what]
    edit_config(folder, change)
    refused(folder, "config.json", text)


@pytest.mark.parametrize(
    "content",
    [b"", b"not json", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"n": ' + b"9" * 5000 + b"}"],
)
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


def test_a_huge_config_is_not_read(folder):
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**40)
    refused(folder, "config.json", "larger than")


@given(
    junk=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3),
    )
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_junk_in_place_of_a_value_is_a_checkpoint_error(junk):
    spec, _ = random_group({"q": 3}, 4, 5, torch.Generator().manual_seed(0))
    whole = CheckpointConfig((spec,)).to_dict()
    for key in ("quant_method", "format_version", "experts", "groups"):
        if junk != whole[key] and not (key == "experts" and junk == []) and not (key == "groups" and junk == []):
            with pytest.raises(CheckpointError):
                CheckpointConfig.from_dict(
                    whole | {key: [junk] if key == "experts" and type(junk) is not str else junk}
                )
    for key in ("in_features", "members", "format", "value_dtype"):
        group = spec.to_dict() | {key: junk}
        if not (type(junk) is int and junk > 0):
            with pytest.raises(CheckpointError):
                CheckpointConfig.from_dict(whole | {"groups": [group]})


# --- the safetensors files


def entry(name, **values):
    return lambda header: header[name].update(values)


HEADERS = {
    "a shape that its bytes do not hold": (entry("block.k.mask", shape=[2**40, 2]), "block.k.mask"),
    "a shape of many sides": (entry("block.k.mask", shape=[2**62] * 9), "block.k.mask"),
    "a negative side": (entry("block.k.mask", shape=[-4, -2]), "block.k.mask"),
    "a side that is no integer": (entry("block.k.mask", shape=[4.0, 2]), "block.k.mask"),
    "offsets outside the file": (entry("block.k.mask", data_offsets=[2**60, 2**60 + 8]), "block.k.mask"),
    "offsets that descend": (entry("block.k.mask", data_offsets=[8, 0]), "block.k.mask"),
    "one offset": (entry("block.k.mask", data_offsets=[0]), "block.k.mask"),
    "an unknown dtype": (entry("block.k.mask", dtype="PICKLE"), "block.k.mask"),
    "a dtype that is no text": (entry("block.k.mask", dtype=["U8"]), "block.k.mask"),
    "another dtype of the same size": (entry("block.k.mask", dtype="I8"), "block.k.mask"),
    "another shape of the same size": (entry("block.k.mask", shape=[2, 4]), "block.k.mask"),
    "an entry that is no mapping": (lambda header: header.update({"block.k.mask": 3}), "block.k.mask"),
    "tensors that overlap": (lambda header: header.update({"again": header["norm.weight"]}), "data at byte"),
    "a header that is no mapping": (lambda header: [1], SINGLE),
    "bytes that no tensor names": (lambda header: header.pop("norm.weight") and header, SINGLE),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_bad_header_is_refused(folder, what):
    change, text = HEADERS[what]
    rewrite_header(folder / SINGLE, change)
    refused(folder, SINGLE, text)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:keep])
    refused(folder, SINGLE)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**63, 2**64 - 1])
def test_a_header_length_that_lies_is_refused(folder, length):
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(struct.pack("<Q", length) + data[8:])
    refused(folder, SINGLE)


def test_a_header_length_is_not_believed_even_if_the_file_is_that_long(folder):
    with (folder / SINGLE).open("wb") as file:
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)
    refused(folder, SINGLE, "header's length")


def test_bytes_behind_the_data_are_refused(folder):
    with (folder / SINGLE).open("ab") as file:
        file.write(b"extra")
    refused(folder, SINGLE)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "int8", "int4 with int3g32", "int6 with int4g64"])
@given(position=st.integers(0, 2000), value=st.integers(0, 255))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_noticed_or_harmless(tmp_path_factory, value_dtype, position, value):
    """Whatever byte changes, the checkpoint is refused with a CheckpointError or can be read as a whole."""
    folder = small_checkpoint(tmp_path_factory.mktemp("flip") / "model", value_dtype=value_dtype)
    data = bytearray((folder / SINGLE).read_bytes())
    data[position % len(data)] = value
    (folder / SINGLE).write_bytes(bytes(data))
    try:
        verify_checkpoint(folder)
    except CheckpointError:
        return
    spec = read_config(folder).groups[0]
    factors = unpack_group(spec, read_tensors(folder))
    assert all(bool(torch.isfinite(part).all()) for part in (factors.dictionary, *factors.coefficients.values()))


def one_more(mask):
    """Set a bit that is not set yet, where the values of an even number of bits have room for it."""
    assert int(torch.tensor([bin(byte).count("1") for byte in mask.flatten().tolist()]).sum()) % 2
    for place in range(11):
        if not mask[0, place // 8] >> place % 8 & 1:
            mask[0, place // 8] |= 1 << place % 8
            return


def set_first(key, value):
    def change(tensors):
        tensors[key] = tensors[key].clone()
        tensors[key].view(-1)[0] = value

    return change


TENSORS = {
    "an 8-bit dictionary that is not": (
        "bitmask",
        "bfloat16 with int8",
        lambda t: t.update({"block.q.dictionary": t["block.q.dictionary"].bfloat16()}),
        "block.q.dictionary",
    ),
    "a 4-bit mask that counts one more": (
        "bitmask",
        "int4",
        lambda t: one_more(t["block.k.mask"]),
        "block.k.values: ",
    ),
    "padding bits of 6-bit values": (
        "dense",
        "int6 with int3g32",
        lambda t: t["block.q.values"][-1].bitwise_or_(0xF0),
        "block.q.values: padding bits",
    ),
    "padding bits of an atom": (
        "bitmask",
        "bfloat16 with int3g32",
        lambda t: t["block.q.dictionary"][3, -1].bitwise_or_(0x80),
        "block.q.dictionary: padding bits",
    ),
    "a row of atoms that is too short": (
        "bitmask",
        "bfloat16 with int4g64",
        lambda t: t.update({"block.q.dictionary": t["block.q.dictionary"][:, :-1]}),
        "block.q.dictionary",
    ),
    "float32 scales of groups": (
        "bitmask",
        "bfloat16 with int4g64",
        lambda t: t.update({"block.q.dictionary_scales": t["block.q.dictionary_scales"].float()}),
        "block.q.dictionary_scales",
    ),
    "NaN in the values": ("bitmask", "bfloat16", set_first("block.k.values", float("nan")), "block.k.values"),
    "infinity in the values": ("csr", "float16", set_first("block.k.values", float("inf")), "block.k.values"),
    "NaN in the dictionary": (
        "bitmask",
        "bfloat16",
        set_first("block.q.dictionary", float("nan")),
        "block.q.dictionary",
    ),
    "NaN in the bias": ("dense", "float32", set_first("block.q.bias", float("nan")), "block.q.bias"),
    "14-bit infinity": ("bitmask", "bfloat14", lambda t: t["block.k.values"].fill_(255), "block.k.values"),
    "a mask that counts otherwise": (
        "bitmask",
        "bfloat16",
        lambda t: t["block.k.mask"][0, 0].bitwise_xor_(1),
        "block.k.values",
    ),
    "padding bits of the mask": (
        "bitmask",
        "bfloat16",
        lambda t: t["block.k.mask"][0, 1].bitwise_or_(128),
        "block.k.mask",
    ),
    "an atom out of range": ("csr", "bfloat16", set_first("block.k.columns", 11), "block.k.columns"),
    "pointers out of order": ("csr", "bfloat16", set_first("block.k.row_pointers", 1), "block.k.row_pointers"),
    "a missing tensor": ("bitmask", "bfloat16", lambda t: t.pop("block.k.mask"), "block.k.mask"),
    "a missing bias": ("bitmask", "bfloat16", lambda t: t.pop("block.q.bias"), "block.q.bias"),
    "a weight beside the factors": (
        "bitmask",
        "bfloat16",
        lambda t: t.update({"block.k.weight": torch.ones(4, 5)}),
        "block.k.weight",
    ),
    "values that are too few": (
        "bitmask",
        "bfloat16",
        lambda t: t.update({"block.k.values": t["block.k.values"][1:]}),
        "block.k.values",
    ),
    "values of another dtype": (
        "bitmask",
        "bfloat16",
        lambda t: t.update({"block.k.values": t["block.k.values"].half()}),
        "block.k.values",
    ),
    "a bias of whole numbers": (
        "bitmask",
        "bfloat16",
        lambda t: t.update({"block.q.bias": t["block.q.bias"].int()}),
        "block.q.bias",
    ),
    "a missing dictionary scale": (
        "bitmask",
        "int8",
        lambda t: t.pop("block.q.dictionary_scales"),
        "dictionary_scales",
    ),
    "missing scales": ("dense", "int8", lambda t: t.pop("block.k.scales"), "block.k.scales"),
    "scales where there are none": (
        "bitmask",
        "bfloat16",
        lambda t: t.update({"block.k.scales": torch.ones(4)}),
        "block.k.scales",
    ),
    "scales of too few columns": (
        "csr",
        "int8",
        lambda t: t.update({"block.k.scales": t["block.k.scales"][1:]}),
        "block.k.scales",
    ),
    "scales of another dtype": (
        "bitmask",
        "int8",
        lambda t: t.update({"block.q.dictionary_scales": t["block.q.dictionary_scales"].bfloat16()}),
        "block.q.dictionary_scales",
    ),
    "a dictionary without sign": (
        "bitmask",
        "int8",
        lambda t: t.update({"block.q.dictionary": t["block.q.dictionary"].view(torch.uint8)}),
        "block.q.dictionary",
    ),
    "-128 in the dictionary": (
        "bitmask",
        "int8",
        set_first("block.q.dictionary", -128),
        "block.q.dictionary: holds -128",
    ),
} | {
    f"{text} among {key}": (format, "int8", set_first(key, value), key)
    for format in ("bitmask", "csr", "dense")
    for key, text, value in [
        ("block.k.values", "-128", -128),
        *(
            (key, f"a scale of {value}", value)
            for key in ("block.k.scales", "block.q.dictionary_scales")
            for value in (float("nan"), float("inf"), -1.0, 0.0, 2.0**-127, 3e38, 1 + 2.0**-16)
        ),
    ]
}
TENSORS |= {
    f"a scale of {value} among 4-bit {key}": ("bitmask", "int4 with int4g32", set_first(key, value), key)
    for key in ("block.k.scales", "block.q.dictionary_scales")
    for value in (float("nan"), -float("inf"), 0.0, -(2.0**-127), -3e38)
}


@pytest.mark.parametrize("what", TENSORS)
def test_bad_tensors_are_refused_by_file_and_name(tmp_path, what):
    format, value_dtype, change, name = TENSORS[what]
    folder = small_checkpoint(tmp_path / "model", format, value_dtype, change=change)
    refused(folder, name, *(() if "missing" in what else (SINGLE,)))


def test_sizes_that_the_file_does_not_hold_take_no_memory(folder):
    def change(q):
        q["groups"][0].update(n_atoms=2**20, in_features=2**12)
        q["groups"][0]["members"][0].update(out_features=2**12, n_stored=2**31)

    edit_config(folder, description(change))
    refused(folder, "block.q.dictionary", "(1048576, 4096)")


# --- the folder


@pytest.mark.parametrize(
    "name", ["../model/model-00001-of-00002.safetensors", "/etc/passwd", "..", "a/b", "a\\b", "", "x\0"]
)
def test_an_index_that_leaves_the_folder_is_refused(tmp_path, name):
    folder = small_checkpoint(tmp_path / "model", shards=2)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "leaves the folder")


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(tmp_path, content):
    folder = small_checkpoint(tmp_path / "model", shards=2)
    (folder / INDEX).write_text(json.dumps(content))
    refused(folder, INDEX, "weight_map")


def test_a_missing_shard_is_named(tmp_path):
    folder = small_checkpoint(tmp_path / "model", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors", "missing")


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update({"norm.weight": m["block.q.mask"]}),
        lambda m: m.update({"ghost": m["norm.weight"]}),
        lambda m: m.pop("block.q.mask"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, change):
    folder = small_checkpoint(tmp_path / "model", shards=2)
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, INDEX, "of-00002.safetensors: tensor")


def test_weights_that_are_there_twice_are_refused(tmp_path):
    folder = small_checkpoint(tmp_path / "model", shards=2)
    save_file({"a": torch.ones(1)}, folder / SINGLE)
    refused(folder, "not clear which one counts")


def test_no_weights_at_all(folder):
    (folder / SINGLE).unlink()
    refused(folder, SINGLE, "missing")


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_link_out_of_the_folder_is_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, name, "leaves the folder")


def test_links_inside_the_folder_and_into_the_hubs_cache_are_followed(tmp_path):
    snapshot = small_checkpoint(tmp_path / "models--x" / "snapshots" / "abc")
    (tmp_path / "models--x" / "blobs").mkdir()
    for name, blob in ((SINGLE, "1234"), ("config.json", "5678")):
        (snapshot / name).rename(tmp_path / "models--x" / "blobs" / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    verify_checkpoint(snapshot)
    folder = small_checkpoint(tmp_path / "model")
    (folder / SINGLE).rename(folder / "real")
    (folder / SINGLE).symlink_to("real")
    verify_checkpoint(folder)


def test_a_link_in_a_circle_and_a_folder_in_place_of_a_file(folder):
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to(SINGLE)
    refused(folder, SINGLE)
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()
    refused(folder, SINGLE, "is not a file")


def test_an_unknown_tensor_name_is_an_error(folder):
    with pytest.raises(CheckpointError, match="nosuch"):
        read_tensors(folder, ["nosuch"])
    assert set(read_header(folder / SINGLE)) == set(read_tensors(folder))
    assert read_config(folder).groups[0].name == "block.q"
