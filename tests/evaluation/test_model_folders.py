"""Models in folders measured block by block and in parts: the same bits as of the whole model in memory."""

import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import cospadi
from cospadi.backends.sparse_linear import sparse_modules
from cospadi.calibration.activations import ActivationCache
from cospadi.errors import CheckpointError, NumericalError, UsageError
from cospadi.evaluation import model_folders as folder
from cospadi.evaluation.activation_budget import LOGITS_BYTES, windows_per_batch
from cospadi.evaluation.comparison import Protocol
from cospadi.evaluation.likelihood import batch_nlls, perplexity
from cospadi.evaluation.model_folders import load_model, measure_folders
from cospadi.evaluation.multiple_choice import Question
from cospadi.evaluation.streaming import open_streamed
from cospadi.executors.base import perform
from cospadi.executors.local import SerialExecutor
from cospadi.formats.checksums import write_checksums
from cospadi.pipeline.stages import compress
from cospadi.recipe.options import CalibrationConfig, CompressionConfig
from cospadi.recipe.resources import Execution
from tests.checkpoints import make_checkpoint
from tests.helpers import tiny_model, token_windows

CPU = torch.device("cpu")
DIFFERENT = ["llama", "gemma2", "gpt2", "phi3", "opt", "qwen3-moe"]
"""Architectures whose blocks, embeddings or logits are computed in different ways."""


@pytest.fixture(autouse=True)
def untokenized(monkeypatch):
    """The tiny models have no tokenizer, and nothing here needs one."""
    for module in ("cospadi.models.dense_model", "cospadi.evaluation.model_folders"):
        monkeypatch.setattr(f"{module}.read_tokenizer", lambda path: None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A dense model and a compressed one, as folders."""
    root = tmp_path_factory.mktemp("pair")
    tiny_model("llama").save_pretrained(root / "dense")
    make_checkpoint(root / "small", "llama")
    write_checksums(root / "small")
    return root / "dense", root / "small"


def protocol(n_windows=5):
    return Protocol("random tokens", token_windows(n_windows), batch_size=2)


def in_memory(path, windows, backend="auto"):
    return list(batch_nlls(load_model(path, backend, "cpu"), windows, 2))


@pytest.mark.parametrize("architecture", DIFFERENT)
def test_streamed_equals_in_memory_bit_for_bit(tmp_path, architecture):
    tiny_model(architecture).to(torch.bfloat16).save_pretrained(tmp_path / "dense", max_shard_size="30KB")
    make_checkpoint(tmp_path / "small", architecture, value_dtype="bfloat16", dtype=torch.bfloat16)
    windows = token_windows(5)
    for path in (tmp_path / "dense", tmp_path / "small"):
        expected = in_memory(path, windows)
        assert len(set(expected)) == 3
        source = open_streamed(path, "auto", CPU)
        assert source.batch_nlls(windows, 2) == expected
        assert source.batch_nlls(windows, 2) == expected  # nothing of the first walk is left
        assert source.model.dtype == load_model(path, "auto", "cpu").dtype


@pytest.mark.parametrize(
    ("architecture", "backend"), [("llama-tied", "auto"), ("gpt2", "reference"), ("mixtral", "auto")]
)
def test_a_dictionary_of_another_block_is_there_when_it_is_needed(tmp_path, architecture, backend):
    config = CompressionConfig(
        solver="svd",
        ratio=0.3,
        groups="consecutive:2",
        allocation="uniform",
        column_weights=False,
        calibration=CalibrationConfig(batch_size=2),
    )
    compress(tiny_model(architecture).to(torch.bfloat16), tmp_path / "out", config, windows=token_windows())
    source = open_streamed(tmp_path / "out", backend, CPU)
    assert len(source.borrowed) == 1
    assert len(next(iter(source.borrowed.values()))) > 1
    windows = token_windows(4, seed=1)
    assert source.batch_nlls(windows, 2) == in_memory(tmp_path / "out", windows, backend)
    assert all(tensor.is_meta for name, tensor in source.model.named_parameters() if "layers" in name)


def test_one_block_and_what_is_made_of_it_are_in_memory_at_a_time(pair):
    source = open_streamed(pair[1], "reference", CPU)
    blocks = [source.model.get_submodule(name) for name in source.blocks]
    seen = []

    def look(module, args, output):
        loaded = [any(not p.is_meta for p in block.parameters()) for block in blocks]
        made = [any(layer._bundle._prepared for layer in sparse_modules(block).values()) for block in blocks]
        seen.append((sum(loaded), sum(made)))

    for block in blocks:
        block.register_forward_hook(look)
    source.batch_nlls(token_windows(5), 2)
    assert seen == [(1, 1)] * 6


def test_hidden_states_beyond_the_limit_wait_on_disk(pair, tmp_path):
    windows = token_windows(5)
    for path in pair:
        with ActivationCache(0, tmp_path / "scratch") as cache:
            assert open_streamed(path, "auto", CPU).batch_nlls(windows, 2, cache=cache) == in_memory(path, windows)
            assert cache.spilled_bytes > 0
            assert cache.peak_bytes == 0


class Elsewhere(SerialExecutor):
    """Pretends to be several workers: tasks travel as bytes, and the last one comes first."""

    n_workers = 3

    def run(self, tasks):
        self.names = [task.name for task in tasks]
        for index, task in reversed(list(enumerate(tasks))):
            data = pickle.dumps(task)
            assert len(data) < 5000  # its own windows, not those of all parts
            own = pickle.loads(data)
            yield index, pickle.loads(pickle.dumps(perform(own, self.device, self.threads, own.read)))


@pytest.mark.parametrize(("n_windows", "limit"), [(2, None), (9, None), (9, 2**40)])
def test_the_result_does_not_depend_on_who_computes_it(pair, monkeypatch, n_windows, limit):
    asked = protocol(n_windows)
    alone = measure_folders(pair, asked, execution=Execution(threads=1, max_memory=limit))
    other = Elsewhere("cpu", 1)
    monkeypatch.setattr(folder, "make_executor", lambda *args, **kwargs: other)
    told = []
    parts = measure_folders(
        pair, asked, execution=Execution(max_memory=limit), progress=lambda *counts: told.append(counts)
    )
    assert parts == alone
    n_batches = len(asked.batches)
    assert len(other.names) == 2 * min(3, n_batches)
    assert told[0] == (0, 2 * n_batches)
    assert told[-1] == (2 * n_batches, 2 * n_batches)
    for path, found in zip(pair, parts, strict=True):
        expected = perplexity(load_model(path, "auto", "cpu"), asked.windows, batch_size=2)
        assert found.perplexity == expected
        assert found.dtype == "float32"


@pytest.mark.slow
def test_processes_of_this_machine_find_the_same(tmp_path, pair):
    import transformers as tf
    from tokenizers import Tokenizer, models

    words = tf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({str(i): i for i in range(96)})))
    for path in pair:
        words.save_pretrained(path)
    write_checksums(pair[1])
    execution = Execution(workers=2, threads=1, max_memory=2**40)
    assert measure_folders(pair, protocol(), execution=execution) == measure_folders(
        pair, protocol(), execution=Execution(threads=1, max_memory=2**40)
    )


@pytest.mark.parametrize("limit", [None, 2**40])
def test_progress_goes_from_nothing_to_all_batches(pair, limit):
    told = []
    execution = Execution(max_memory=limit)
    measure_folders(pair, protocol(), execution=execution, progress=lambda *counts: told.append(counts))
    done = [count for count, _ in told]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, 6)
    assert {total for _, total in told} == {6}
    assert len(done) > 6


def test_a_limit_leaves_out_the_sample_and_says_so(pair, monkeypatch):
    asked = replace(protocol(), prompt="Once")
    monkeypatch.setattr(folder, "generate", lambda model, tokenizer, prompt: f"{prompt} more")
    free = measure_folders(pair, asked)
    assert [(one.sample, one.note) for one in free] == [("Once more", None)] * 2
    limited = measure_folders(pair, asked, execution=Execution(max_memory=2**40))
    assert [one.sample for one in limited] == [None, None]
    assert all("no sample" in one.note for one in limited)
    assert [one.perplexity for one in limited] == [one.perplexity for one in free]


def test_a_limit_that_is_too_low_tells_the_least_that_is_enough(pair):
    with pytest.raises(UsageError, match=r"max_memory 0\.00 GiB is too little.*at least \d+\.\d\d GiB"):
        measure_folders(pair, protocol(), execution=Execution(max_memory=1000))


def test_multiple_choice_is_refused_within_a_limit(pair):
    asked = replace(protocol(), questions=[Question("1 + 1 =", ("2", "3"), 0)])
    with pytest.raises(UsageError, match="multiple choice needs the whole model"):
        measure_folders(pair, asked, execution=Execution(max_memory=2**40))


@pytest.mark.parametrize("limit", [None, 2**40])
def test_a_changed_byte_is_noticed(tmp_path, limit):
    made = make_checkpoint(tmp_path / "small")
    write_checksums(made.folder)
    data = bytearray((made.folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (made.folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        measure_folders([made.folder], protocol(), execution=Execution(max_memory=limit))


def test_a_missing_tensor_is_named(tmp_path):
    made = make_checkpoint(tmp_path / "small")
    tensors = load_file(made.folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, made.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"needs tensor model\.layers\.1\.input_layernorm\.weight"):
        open_streamed(made.folder, "auto", CPU)


def test_nan_is_placed_in_the_text_by_every_part(tmp_path, monkeypatch):
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.embed_tokens.weight[7], math.nan)
    model.save_pretrained(tmp_path / "dense")
    asked = protocol(6)
    asked.windows[asked.windows == 7] = 8
    asked.windows[5, 3] = 7
    for limit in (None, 2**40):
        with pytest.raises(NumericalError, match="in windows 4 to 5"):
            measure_folders([tmp_path / "dense"], asked, execution=Execution(max_memory=limit))
    monkeypatch.setattr(folder, "make_executor", lambda *args, **kwargs: Elsewhere("cpu", 1))
    with pytest.raises(NumericalError, match="in windows 4 to 5"):
        measure_folders([tmp_path / "dense"], asked)


def test_an_encoder_is_refused(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    for limit in (None, 2**40):
        with pytest.raises(UsageError, match="not a causal language model"):
            measure_folders([tmp_path / "bert"], protocol(), execution=Execution(max_memory=limit))


@given(vocabulary=st.integers(1, 10**6), window=st.integers(2, 10**6))
def test_a_batch_has_as_many_windows_as_its_logits_allow(vocabulary, window):
    size = windows_per_batch(vocabulary, window)
    assert 1 <= size <= 4
    assert size == 1 or 4 * size * window * vocabulary <= LOGITS_BYTES
    assert size == 4 or 4 * (size + 1) * window * vocabulary > LOGITS_BYTES


def test_the_recommended_backend_of_a_checkpoint_need_not_run_here(pair, tmp_path):
    path = Path(shutil.copytree(pair[1], tmp_path / "copy"))
    (path / "SHA256SUMS").unlink()
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["backend"] = "reference"
    (path / "config.json").write_text(json.dumps(config))
    windows = token_windows(2)
    expected = list(batch_nlls(cospadi.load(path, "torch", torch.float32), windows, 2))
    assert open_streamed(path, "torch", CPU).batch_nlls(windows, 2) == expected
