import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from cospadi_cli.main import main
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cospadi.calibration.data import read_text


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home and a working folder of its own for each test."""
    for name in ("HOME", "COSPADI_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random Llama with a byte-level tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([read_text(None)[:50_000]], trainer)
    wrapped = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    tf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def compression(tiny_model, tmp_path_factory):
    """The one compression of the tiny model that tests share: its result, checkpoint, log and events."""
    folder = tmp_path_factory.mktemp("checkpoint")
    out, log, events = folder / "out", folder / "run.log", folder / "run.jsonl"
    log.write_text("before\n")
    files = ["--log-file", str(log), "--events", str(events)]
    result = CliRunner().invoke(main, compress_command(tiny_model, out, *files))
    assert result.exit_code == 0, result.output
    return SimpleNamespace(result=result, out=out, log=log, events=events, report=read_report(out))


@pytest.fixture(scope="session")
def compressed(compression):
    """The checkpoint that ``compress`` makes of the tiny model."""
    return compression.out


@pytest.fixture
def fresh(compressed, tmp_path):
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(compressed, tmp_path / "copy"))


def read_report(out):
    return json.loads((Path(out) / "report.json").read_text())


def compress_command(model, out, *more):
    few = ["--samples", "4", "--seq-len", "32", "--batch-size", "2", "--eval-tokens", "64", "--solver", "single-step"]
    return ["compress", str(model), "-o", str(out), *few, *more]


@pytest.fixture
def run():
    """Invoke the command line; gives the result with exit_code, stdout and stderr."""

    def invoke(*arguments):
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


def error_line(result, code=2):
    """Check that a command failed with one clear line on standard error and nothing on standard output."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().split("\n")
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    return lines[0]
