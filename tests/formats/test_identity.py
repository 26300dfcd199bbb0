"""Layers that are only quantised: the weight is the dictionary, and nothing else is stored."""

import json

import pytest
import torch

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.base import FORMATS, PackedCoefficients
from cospadi.formats.checkpoint import CheckpointConfig, ShardWriter
from cospadi.formats.dictionary import DICTIONARY_DTYPES, dictionary_bits, pack_dictionary, unpack_dictionary
from cospadi.formats.factorization import GroupSpec, SparseFactorization
from cospadi.formats.packing import group_bits, pack_group, unpack_group
from cospadi.formats.quantization import dequantize, grid_of, representable_scales, scale_shape
from cospadi.formats.verify import verify_checkpoint


@pytest.fixture
def codec():
    return FORMATS.create("identity")


def weight(in_features=70, out_features=9):
    return torch.randn(in_features, out_features, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [d for d in DICTIONARY_DTYPES if d != "none"])
def test_the_weight_survives_in_every_dictionary_dtype(codec, dtype):
    W = weight()
    spec, tensors = pack_group(SparseFactorization.of_weight("a.q", W), "identity", "none", {}, True, dtype)
    assert GroupSpec.from_dict(spec.to_dict()) == spec
    assert set(tensors) <= {"a.q.dictionary", "a.q.dictionary_scales"}
    bits = group_bits(70, 9, [9], 5, codec, "none", dtype)
    assert 8 * sum(t.nbytes for t in tensors.values()) == bits == dictionary_bits(9, 70, dtype)
    back = unpack_group(spec, tensors)
    stored = unpack_dictionary(pack_dictionary(W, dtype)).T
    assert torch.equal(back.to_dense("a.q"), stored.float())
    again = pack_group(back, "identity", "none", {}, True, dtype)
    assert again[0] == spec
    assert all(torch.equal(again[1][key], tensors[key]) for key in tensors)


def test_a_weight_on_a_grid_is_stored_exactly():
    grid = grid_of("int3g32")
    generator = torch.Generator().manual_seed(1)
    scales = representable_scales(torch.randn(scale_shape(9, 70, grid), generator=generator), grid)
    whole = torch.randint(grid.lowest, grid.highest + 1, (9, 70), generator=generator)
    W = dequantize(whole.to(torch.int8), scales, grid).T
    spec, tensors = pack_group(SparseFactorization.of_weight("q", W, scales), "identity", "none", {}, True, "int3g32")
    assert torch.equal(tensors["q.dictionary_scales"], scales)
    assert torch.equal(unpack_group(spec, tensors).to_dense("q"), W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_identity_is_all_that_is_packed(codec, dtype):
    packed = codec.pack(torch.eye(5, dtype=dtype), "none")
    codec.check(packed)
    assert (packed.tensors, codec.n_stored(packed), codec.bits(5, 5, 0, "none")) == ({}, 0, 0)
    assert torch.equal(codec.unpack(packed), torch.eye(5))
    assert codec.gather(packed, torch.ones(5, 5)).shape == (0,)


OTHERS = {
    "another diagonal": 2 * torch.eye(4),
    "too many rows": torch.eye(5, 4),
    "too many columns": torch.eye(4, 5),
    "something beside it": torch.eye(4) + torch.eye(4).roll(1, dims=1),
    "another order": torch.eye(4).flip(0),
    "zeros": torch.zeros(4, 4),
    "not a number": torch.eye(4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_coefficients_are_refused(codec, what):
    with pytest.raises(UsageError, match=r"takes the identity.*choose 'bitmask'"):
        codec.pack(OTHERS[what], "none")


def test_what_the_identity_has_no_use_for_is_refused(codec):
    with pytest.raises(UsageError, match="'identity' does not store 'bfloat16' values"):
        codec.pack(torch.eye(3), "bfloat16")
    with pytest.raises(UsageError, match="'bitmask' does not store 'none' values"):
        FORMATS.create("bitmask").pack(torch.eye(3), "none")
    with pytest.raises(UsageError, match="the identity has no scales"):
        codec.pack(torch.eye(3), "none", torch.ones(3))
    group = SparseFactorization(torch.ones(4, 3), {"q": torch.eye(3), "k": torch.eye(3)})
    with pytest.raises(UsageError, match="has one layer in a group, found 2"):
        pack_group(group, "identity", "none", {}, True, "int8")
    with pytest.raises(UsageError, match="'none' does not go with format 'identity'"):
        pack_group(SparseFactorization.of_weight("q", torch.ones(4, 3)), "identity", "none", {}, True)
    with pytest.raises(CheckpointError, match=r"found tensors \['values'\]"):
        codec.check(PackedCoefficients("identity", 3, 3, "none", {"values": torch.ones(3)}))


def checkpoint(folder, change=lambda group: None):
    """A layer that is quantised to 4 bits, with a bias; ``change`` edits its description."""
    group = SparseFactorization.of_weight("a.q", weight())
    spec, tensors = pack_group(group, "identity", "none", {"a.q": torch.ones(9)}, True, "int4g64")
    with ShardWriter(folder) as writer:
        writer.add("a.q", tensors)
    config = CheckpointConfig((spec,)).to_dict()
    change(config["groups"][0])
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


def test_a_checkpoint_is_verified(tmp_path):
    (spec,) = verify_checkpoint(checkpoint(tmp_path)).groups
    assert (spec.format, spec.value_dtype, spec.dictionary_dtype) == ("identity", "none", "int4g64")


def add_member(group):
    group["members"].append({"name": "a.k", "out_features": 9, "n_stored": 0, "bias": False})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g.update(n_atoms=8), "an atom for each of the 9 outputs"),
        (lambda g: g["members"][0].update(out_features=10), "an atom for each of the 10 outputs"),
        (lambda g: g["members"][0].update(n_stored=1), "found 9 atoms and 1 coefficients"),
        (add_member, "one layer in a group, found 2"),
        (lambda g: g.update(value_dtype="int8"), "'identity' does not store 'int8' values"),
        (lambda g: g.update(format="bitmask"), "'bitmask' does not store 'none' values"),
        (lambda g: g.update(dictionary_dtype="none"), "'none' does not go with format 'identity'"),
        (lambda g: g.update(dictionary_dtype="int4"), "'int4' is no dtype of a dictionary"),
        (lambda g: g.update(dictionary_dtype="int4g32"), "dictionary_scales"),
        (lambda g: g.update(dictionary_dtype="int3g64"), "tensor a.q.dictionary"),
        (lambda g: g.update(in_features=71), "tensor a.q.dictionary"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, text):
    with pytest.raises(CheckpointError, match=text):
        verify_checkpoint(checkpoint(tmp_path, change))
