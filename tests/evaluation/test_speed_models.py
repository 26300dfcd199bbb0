"""Whole models: the arithmetic of their rates, the loop that they share, and their memory."""

import json

import pytest
import torch

from cospadi.errors import UsageError
from cospadi.evaluation.speed import whole_models
from tests.checkpoints import make_checkpoint

CPU = torch.device("cpu")
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("speed") / "model")


def settings_of(made, **changed):
    few = {"dtypes": (F32,), "prompt_tokens": 12, "new_tokens": 3, "repeats": 3, "backends": ("reference",)}
    return whole_models.ModelSettings(str(made.folder), **{**few, "memory": False, **changed})


def test_models_are_measured_by_the_same_loop(checkpoint, world, monkeypatch):
    from cospadi.evaluation.speed.greedy_decoding import Run

    prices = {}

    def timed(part, seconds):
        original = getattr(Run, part)

        def run(self, *args):
            compressed = any("SparseLinear" in type(module).__name__ for module in self.model.modules())
            prices[part] = seconds
            world.work(seconds * (4 if compressed and part == "decode" else 0.5 if compressed else 1))
            return original(self, *args)

        monkeypatch.setattr(Run, part, run)

    timed("prefill", 6.0)
    timed("decode", 1.5)
    told = []
    found = whole_models.measure_model(settings_of(checkpoint), told.append, world.clock).to_dict()
    found = json.loads(json.dumps(found, allow_nan=False))
    dense, compressed = found["rows"]
    assert (dense["contender"], compressed["contender"]) == ("dense", "reference")
    assert (dense["prefill_tokens_per_second"], dense["decode_tokens_per_second"]) == (2.0, 2.0)
    assert (compressed["prefill_tokens_per_second"], compressed["decode_tokens_per_second"]) == (4.0, 0.5)
    assert (compressed["times_prefill"], compressed["times_decode"]) == (2.0, 0.25)
    assert compressed["verdict"] == "slower than dense (decode)"
    assert (dense["times_prefill"], dense["times_decode"], dense["verdict"]) == (1.0, 1.0, "")
    assert compressed["logits_difference"] < 1e-4  # the dense model is this checkpoint, multiplied out
    assert dense["logits_difference"] == 0
    assert "multiplied out" in found["baseline"]
    assert found["chosen"] == {}
    assert found["attention"]
    assert dense["peak_bytes"] is None


def test_the_loop_writes_what_generate_writes(checkpoint):
    from cospadi.evaluation.speed.greedy_decoding import Run, random_prompt

    model = checkpoint.dense.eval()
    ids = random_prompt([model], 9, 6)
    assert torch.equal(ids, random_prompt([model], 9, 6))
    run = Run(model, ids)
    run.prefill()
    tokens = [run._token]
    for _ in range(5):
        run.decode(1)
        tokens.append(run._token)
    written = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(tokens, dim=1), written[:, 9:])


def test_another_dense_model_can_be_the_baseline(checkpoint, tmp_path):
    checkpoint.dense.save_pretrained(tmp_path / "dense")
    clock = lambda work: (work(), 1.0)[1]  # noqa: E731
    found = whole_models.measure_model(settings_of(checkpoint, baseline=str(tmp_path / "dense")), clock=clock)
    assert found.baseline == str(tmp_path / "dense")
    assert [row.logits_difference for row in found.rows] == [None, None]
    dense, compressed = found.rows
    assert dense.weight_bytes == sum(p.nbytes for p in checkpoint.dense.parameters()) + sum(
        b.nbytes for b in checkpoint.dense.buffers()
    )
    assert compressed.weight_bytes != dense.weight_bytes


def test_the_memory_of_a_model_is_that_of_a_process(checkpoint):
    from cospadi.evaluation.speed.model_variants import ModelVariant
    from cospadi.evaluation.speed.peak_memory import peak_in_a_process

    found = peak_in_a_process(ModelVariant(str(checkpoint.folder), "reference", "cpu", "float32"), 8, 2)
    assert 0 < found.before_bytes <= found.loaded_bytes <= found.peak_bytes < 1 << 36
    assert "high-water" in found.method


def test_what_keeps_a_process_from_loading_is_said(tmp_path):
    from cospadi.errors import CospadiError
    from cospadi.evaluation.speed.model_variants import ModelVariant
    from cospadi.evaluation.speed.peak_memory import peak_in_a_process

    with pytest.raises(CospadiError, match=r"cannot be measured: .*no such folder"):
        peak_in_a_process(ModelVariant(str(tmp_path / "absent"), "reference", "cpu", "float32"), 8, 2)


def test_models_that_cannot_be_measured_are_refused_before_anything_is_loaded(checkpoint, tmp_path, monkeypatch):
    checkpoint.dense.save_pretrained(tmp_path / "dense")
    loaded = []
    monkeypatch.setattr(whole_models, "load_variant", lambda wanted: loaded.append(wanted))
    with pytest.raises(UsageError, match="dense model"):
        whole_models.measure_model(whole_models.ModelSettings(str(tmp_path / "dense")))
    with pytest.raises(UsageError, match="no such folder"):
        whole_models.measure_model(whole_models.ModelSettings(str(tmp_path / "absent")))
    with pytest.raises(UsageError, match="unknown backend"):
        whole_models.measure_model(settings_of(checkpoint, backends=("cudda",)))
    assert loaded == []


def test_more_tokens_than_the_context_are_refused(checkpoint):
    with pytest.raises(UsageError, match="70 tokens of prompt and continuation exceed the model's context of 64"):
        whole_models.measure_model(settings_of(checkpoint, prompt_tokens=60, new_tokens=10))
