"""Groups whose dictionary is on the side of the outputs: W^T = D S for a single layer."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.base import FORMATS
from cospadi.formats.checkpoint import CheckpointConfig, ShardWriter, expected_tensors
from cospadi.formats.dictionary import DICTIONARY_DTYPES
from cospadi.formats.factorization import GroupSpec, SparseFactorization
from cospadi.formats.packing import group_bits, pack_group, unpack_group
from cospadi.formats.quantization import dequantize, grid_of, representable_scales, scale_shape
from cospadi.formats.verify import verify_checkpoint
from tests.checkpoints import edit_config

CASES = [(f, v) for f in ("bitmask", "csr", "dense") for v in FORMATS.create(f).value_dtypes]

# Largest error of a number to the largest magnitude in its row.
STEPS = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 0.0, "bfloat14": 2**-6}
STEPS |= {"int8": 0.004, "int6": 0.033, "int4": 0.13, "int4g32": 0.13}

D = torch.tensor([[1.0, 2.0, 3.0], [-127.0, 5.0, 6.0]])
S = torch.tensor([[1.0, 0.0, 0.5, 0.0], [0.0, -2.0, 0.0, 0.0], [0.0, 3.0, 1.0, 0.0]])


def of_output(dictionary, coefficients, name="a.down", **scales):
    return SparseFactorization(dictionary, {name: coefficients}, side="output", **scales)


def same_bits(left, right):
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@st.composite
def factors(draw):
    """Random factors with columns and rows of S of any count, some of them empty."""
    n_atoms, in_features, out_features = (draw(st.integers(1, most)) for most in (37, 41, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    sparse = torch.randn(n_atoms, in_features, generator=generator)
    sparse[torch.rand(sparse.shape, generator=generator) >= draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))] = 0
    if draw(st.booleans()):
        sparse[draw(st.integers(0, n_atoms - 1))] = 0
        sparse[:, draw(st.integers(0, in_features - 1))] = 0
    return torch.randn(out_features, n_atoms, generator=generator), sparse


@pytest.mark.parametrize(("name", "value_dtype"), CASES)
@pytest.mark.parametrize("dictionary_dtype", ["bfloat16", "float32", "int8", "int4g32"])
@settings(max_examples=10, deadline=None)
@given(made=factors())
def test_what_is_unpacked_packs_to_the_same_tensors_and_multiplies_out(name, value_dtype, dictionary_dtype, made):
    dictionary, sparse = made
    bias = torch.ones(dictionary.shape[0])
    spec, tensors = pack_group(
        of_output(dictionary, sparse), name, value_dtype, {"a.down": bias}, True, dictionary_dtype
    )
    assert {key: (tuple(t.shape), (t.dtype,)) for key, t in tensors.items() if not key.endswith("bias")} == {
        key: what for key, what in expected_tensors(spec).items() if not key.endswith("bias")
    }
    assert (spec.side, spec.n_atoms, spec.in_features) == ("output", *sparse.shape)
    assert [m.out_features for m in spec.members] == [dictionary.shape[0]]
    assert GroupSpec.from_dict(spec.to_dict()) == spec

    stored = unpack_group(spec, tensors)
    assert (stored.side, stored.in_features, stored.n_atoms) == ("output", spec.in_features, spec.n_atoms)
    again = pack_group(stored, name, value_dtype, {"a.down": bias}, True, dictionary_dtype)
    assert again[0] == spec
    assert all(same_bits(again[1][key], tensor) for key, tensor in tensors.items())
    # Each output of D and each atom of S has a range of its own.
    for found, given_rows, dtype in (
        (stored.dictionary, dictionary, dictionary_dtype),
        (stored.coefficients["a.down"], sparse, value_dtype),
    ):
        error = (found.double() - given_rows.double()).abs()
        assert bool((error <= STEPS[dtype] * given_rows.abs().amax(dim=1, keepdim=True)).all())
    weight = stored.coefficients["a.down"].double().T @ stored.dictionary.double().T
    torch.testing.assert_close(stored.to_dense("a.down", torch.float64), weight, rtol=1e-12, atol=1e-12)
    assert weight.shape == (sparse.shape[1], dictionary.shape[0])


def test_the_layout_is_that_of_the_document():
    spec, tensors = pack_group(of_output(D, S), "bitmask", "bfloat16", {}, True)
    assert spec.to_dict() == {
        "in_features": 4,
        "n_atoms": 3,
        "members": [{"name": "a.down", "out_features": 2, "n_stored": 5, "bias": False}],
        "format": "bitmask",
        "value_dtype": "bfloat16",
        "dictionary_dtype": "bfloat16",
        "shared_input": True,
        "side": "output",
    }
    assert torch.equal(tensors["a.down.dictionary"], D.to(torch.bfloat16))
    assert tensors["a.down.mask"].tolist() == [[5], [2], [6]]
    stored = tensors["a.down.values"].view(torch.uint8).numpy().tobytes()
    assert stored == bytes.fromhex("803f 003f 00c0 4040 803f")


def test_whole_numbers_have_a_scale_for_each_output_and_each_atom():
    _, tensors = pack_group(of_output(D, S), "csr", "int8", {}, True)
    assert tensors["a.down.dictionary"].tolist() == [[42, 85, 127], [-127, 5, 6]]
    assert tensors["a.down.dictionary_scales"].shape == (2,)
    assert float(tensors["a.down.dictionary_scales"][1]) == 1.0
    assert tensors["a.down.values"].tolist() == [127, 64, -127, 127, 42]
    assert tensors["a.down.columns"].tolist() == [0, 2, 1, 1, 2]
    assert tensors["a.down.row_pointers"].tolist() == [0, 2, 3, 5]
    assert tensors["a.down.scales"].shape == (3,)


@pytest.mark.parametrize("dictionary_dtype", [None, *(d for d in DICTIONARY_DTYPES if d != "none")])
def test_the_bits_are_those_on_disk(dictionary_dtype):
    generator = torch.Generator().manual_seed(0)
    for in_features, n_atoms, out_features, n_nonzero in ((70, 16, 12, 4), (33, 41, 7, 1), (8, 1, 65, 1), (9, 5, 3, 0)):
        sparse = torch.zeros(n_atoms, in_features)
        for column in sparse.T:  # as many in every column, which leaves the rows ragged
            # Nothing rounds to zero: all are of one magnitude.
            column[torch.randperm(n_atoms, generator=generator)[:n_nonzero]] = -1.0
        for name, value_dtype in CASES:
            group = of_output(torch.randn(out_features, n_atoms, generator=generator), sparse)
            _, tensors = pack_group(group, name, value_dtype, {}, True, dictionary_dtype)
            counted = group_bits(
                in_features, n_atoms, [out_features], n_nonzero, FORMATS.create(name), value_dtype, dictionary_dtype,
                side="output",
            )  # fmt: skip
            # Values of few bits are counted as they are and stored in whole bytes.
            assert 0 <= 8 * sum(t.nbytes for t in tensors.values()) - counted < 8


@pytest.mark.parametrize("dictionary_dtype", ["int8", "int4g32"])
def test_what_lies_on_the_grids_of_given_scales_is_stored_exactly(dictionary_dtype):
    generator = torch.Generator().manual_seed(1)

    def on_grid(dtype, rows, length):
        grid = grid_of(dtype)
        scales = torch.rand(scale_shape(rows, length, grid), generator=generator) + 0.5
        scales = representable_scales(scales, grid)
        whole = torch.randint(-3, 4, (rows, length), generator=generator).to(torch.int8)
        return dequantize(whole, scales, grid), scales

    dictionary, outputs = on_grid(dictionary_dtype, 9, 70)
    sparse, atoms = on_grid("int6", 70, 11)
    group = of_output(dictionary, sparse, dictionary_scales=outputs, coefficient_scales={"a.down": atoms})
    spec, tensors = pack_group(group, "bitmask", "int6", {}, True, dictionary_dtype)
    assert torch.equal(tensors["a.down.dictionary_scales"], outputs)
    assert torch.equal(tensors["a.down.scales"], atoms)
    stored = unpack_group(spec, tensors)
    assert torch.equal(stored.dictionary, dictionary)
    assert torch.equal(stored.coefficients["a.down"], sparse)
    assert torch.equal(stored.dictionary_scales, outputs)
    with pytest.raises(ValueError, match="do not fit 9 outputs"):
        of_output(dictionary, sparse, dictionary_scales=torch.ones(70))
    with pytest.raises(ValueError, match="fit no coefficients"):
        of_output(dictionary, sparse, coefficient_scales={"a.down": torch.ones(11)})


def test_a_group_of_several_layers_and_layers_that_are_only_quantised_are_refused():
    with pytest.raises(ValueError, match="2 members"):
        SparseFactorization(D, {"a": S, "b": S}, side="output")
    with pytest.raises(ValueError, match="side 'both'"):
        SparseFactorization(D, {"a": S}, side="both")
    square = of_output(torch.ones(3, 3), torch.eye(3))
    with pytest.raises(UsageError, match="'identity' has its dictionary on the side 'input'"):
        pack_group(square, "identity", "none", {}, True, "int8")
    with pytest.raises(UsageError, match="'none' does not go with format 'bitmask' on side 'output'"):
        pack_group(of_output(D, S), "bitmask", "int8", {}, True, "none")
    with pytest.raises(UsageError, match="one layer in a group, found 2"):
        group_bits(4, 3, [2, 2], 1, FORMATS.create("bitmask"), "int8", side="output")


# Damaged and hostile folders


def checkpoint(folder, format="bitmask", value_dtype="bfloat16", dictionary_dtype=None, change=lambda tensors: None):
    generator = torch.Generator().manual_seed(0)
    sparse = torch.randn(11, 13, generator=generator) * (torch.rand(11, 13, generator=generator) < 0.5)
    group = of_output(torch.randn(6, 11, generator=generator), sparse)
    biases = {"a.down": torch.ones(6)}
    spec, tensors = pack_group(group, format, value_dtype, biases, True, dictionary_dtype)
    change(tensors)
    with ShardWriter(folder) as writer:
        writer.add("a.down", tensors)
    config = CheckpointConfig((spec,)).to_dict()
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return folder


@pytest.mark.parametrize(
    ("format", "value_dtype", "dictionary_dtype"),
    [*((f, v, None) for f, v in CASES), ("bitmask", "int4", "int3g32"), ("dense", "bfloat16", "int8")],
)
def test_an_undamaged_checkpoint_is_accepted(tmp_path, format, value_dtype, dictionary_dtype):
    (spec,) = verify_checkpoint(checkpoint(tmp_path, format, value_dtype, dictionary_dtype)).groups
    assert (spec.side, spec.in_features, spec.n_atoms, spec.members[0].out_features) == ("output", 13, 11, 6)


def add_member(group):
    group["members"].append({"name": "a.up", "out_features": 6, "n_stored": 0, "bias": False})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g.pop("side"), "'side'"),
        (lambda g: g.update(side="up"), "side='up', expected one of"),
        (lambda g: g.update(side=["output"]), "expected str"),
        (lambda g: g.update(side="input"), "more coefficients than it has"),
        (add_member, "one layer in a group, found 2"),
        (lambda g: g.update(format="identity", value_dtype="none", n_atoms=6), "on the side 'input'"),
        (lambda g: g.update(n_atoms=10), r"tensor a\.down\.dictionary"),
        (lambda g: g.update(in_features=17), r"tensor a\.down\.mask"),
        (lambda g: g.update(in_features=10), r"a\.down\.mask"),
        (lambda g: g["members"][0].update(out_features=5), r"tensor a\.down\.(dictionary|bias)"),
        (lambda g: g["members"][0].update(n_stored=11 * 13 + 1), "more coefficients than it has"),
        (lambda g: g["members"][0].update(n_stored=3), r"tensor a\.down\.values"),
        (lambda g: g.update(in_features=2**30), "beyond what the format allows"),
        (lambda g: g.update(n_atoms=2**20, in_features=2**20), "beyond what the format allows"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path, change, text):
    folder = checkpoint(tmp_path)
    edit_config(folder, lambda data: change(data["quantization_config"]["groups"][0]))
    with pytest.raises(CheckpointError, match=text):
        verify_checkpoint(folder)


def set_padding(tensors):
    tensors["a.down.mask"][2, 1] |= 0x80  # 13 inputs take 5 bits of the second byte


def damaged(key, value):
    def change(tensors):
        tensors[f"a.down.{key}"].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("value_dtype", "change", "text"),
    [
        ("bfloat16", set_padding, "mask"),
        ("bfloat16", damaged("mask", 0), "values"),
        ("bfloat16", damaged("values", float("nan")), r"a\.down\.values: holds NaN"),
        ("int8", damaged("values", -128), "values"),
        ("int8", damaged("scales", 0), "scales"),
        ("int8", damaged("dictionary_scales", float("inf")), "dictionary_scales"),
        ("int8", damaged("dictionary", -128), "dictionary"),
    ],
)
def test_a_damaged_tensor_is_refused(tmp_path, value_dtype, change, text):
    with pytest.raises(CheckpointError, match=text):
        verify_checkpoint(checkpoint(tmp_path, value_dtype=value_dtype, change=change))
