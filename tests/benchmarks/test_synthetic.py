"""The synthetic checkpoints have the spectrum that they promise, the same bytes each time, and live activations."""

import hashlib

import kills
import numpy as np
import pytest
import synthetic
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 60), columns=st.integers(1, 60), seed=st.integers(0, 9))
def test_singular_values_are_the_given_ones(rows, columns, seed):
    spectrum = (np.arange(min(rows, columns)) + 2.0) ** -0.5
    matrix = synthetic.random_matrix((rows, columns), spectrum, np.random.default_rng(seed))
    np.testing.assert_allclose(np.linalg.svd(matrix.astype(float), compute_uv=False), spectrum, rtol=1e-5)


def test_entries_look_random():
    matrix = synthetic.values("model.layers.0.mlp.up_proj.weight", (384, 256), blocks=2, seed=0)
    assert matrix.std() == pytest.approx(synthetic.STD, rel=1e-3)
    assert abs(matrix.mean()) < 0.1 * synthetic.STD
    # A normal distribution has 3; a single sine would have 1.5, and a few large entries far more.
    kurtosis = (matrix**4).mean() / (matrix**2).mean() ** 2
    assert 2.7 < kurtosis < 3.5
    # Toeplitz or Hankel: neighbours along a diagonal would be alike.
    for one, other in ((matrix[1:, 1:], matrix[:-1, :-1]), (matrix[1:, :-1], matrix[:-1, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.05


def write(out, seed=0, shard_bytes=60_000):
    config = synthetic.llama_config(3, 64, 112, 4, 2, 259)
    total = synthetic.write_model(out, config, kills.byte_tokenizer(), shard_bytes, seed)
    return total, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def test_bytes_depend_on_the_seed_alone(tmp_path):
    total, first = write(tmp_path / "first")
    assert (total, first) == write(tmp_path / "second")
    other = write(tmp_path / "other", seed=1)[1]
    assert first.keys() == other.keys()
    assert len([name for name in first if name.endswith(".safetensors")]) > 3
    assert all(first[name] != other[name] for name in first if name.endswith(".safetensors"))


def test_tensors_do_not_depend_on_the_shards(tmp_path):
    write(tmp_path / "many")
    write(tmp_path / "one", shard_bytes=10**9)
    many, one = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("many", "one"))
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in many)


def test_activations_live_and_keep_their_size(tmp_path):
    write(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    tokens = torch.randint(3, 259, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(tokens, output_hidden_states=True)
    assert torch.isfinite(found.logits).all()
    for hidden in found.hidden_states:
        rows = torch.nn.functional.normalize(hidden.reshape(-1, 64), dim=1)
        likeness = (rows @ rows.T - torch.eye(len(rows))).abs().mean()
        assert likeness < 0.5, "all tokens look alike"
        assert hidden.square().mean().sqrt() < 4
