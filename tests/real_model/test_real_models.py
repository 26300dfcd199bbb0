"""The main job on the real embedded models: a few layers, a few tokens."""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from cospadi_cli.main import main

import cospadi
from cospadi.calibration.data import EMBEDDED_EVALUATION, read_text, token_windows
from cospadi.evaluation import perplexity
from cospadi.models.dense_model import open_model
from cospadi.models.embedded import embedded_encoder
from cospadi.pipeline.stages import compress
from cospadi.recipe.options import CalibrationConfig, CompressionConfig

pytestmark = pytest.mark.integration


def cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_smollm2_two_blocks_end_to_end_by_the_command_line(tmp_path):
    out = tmp_path / "out"
    options = ["--ratio", 0.2, "--samples", 8, "--seq-len", 128, "--eval-tokens", 1024]
    options += ["--storage", "factors", "--value-dtype", "bfloat16"]
    done = cli("compress", "-o", out, *options, "--include", "*.layers.1[01].*", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    totals = report["totals"]
    assert totals["n_layers"] + len(report["kept_dense"]) == 14
    assert 0.2 - 1e-9 <= totals["ratio"] < 0.201
    evaluation = report["evaluation"]
    assert 0.98 <= evaluation["perplexity_ratio"] < 1.2
    # Plain transformers, after import cospadi, computes what cospadi.load does.
    code = (
        "import sys, cospadi, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "print(m.dtype, float(m(**t('The capital of France is', return_tensors='pt')).logits.float().sum()))\n"
    )
    plain = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    dtype, total = plain.stdout.split()
    model = cospadi.load(out)
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(out)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = float(model(**tokens).logits.float().sum())
    assert dtype == "torch.bfloat16"
    assert float(total) == pytest.approx(expected, rel=1e-3)

    dense = tmp_path / "dense"
    assert cli("decompress", out, "-o", dense).exit_code == 0
    windows = token_windows(AutoTokenizer.from_pretrained(out), read_text(None, EMBEDDED_EVALUATION), 128, 4)
    small = perplexity(cospadi.load(out, dtype=torch.float32), windows).token
    large = perplexity(open_model(dense, torch.device("cpu")).model, windows).token
    assert large == pytest.approx(small, rel=0.02)  # the products are rounded to bfloat16


def test_minilm_encoder_keeps_its_sentences_apart(tmp_path):
    config = CompressionConfig(ratio=0.3, calibration=CalibrationConfig(samples=16, seq_len=128))
    report = compress(embedded_encoder(), tmp_path / "out", config)
    assert report["totals"]["n_layers"] + len(report["kept_dense"]) == 36
    assert 0.3 - 1e-9 <= report["totals"]["ratio"] < 0.31
    small = cospadi.load(tmp_path / "out", dtype=torch.float32)
    source = open_model(embedded_encoder(), torch.device("cpu"))
    sentences = ["The cat sits on the mat.", "A kitten rests on a rug.", "Parliament passed the budget on Tuesday."]
    batch = source.tokenizer(sentences, return_tensors="pt", padding=True)

    def similarities(model):
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        return pooled @ pooled.T

    before, after = similarities(source.model), similarities(small)
    torch.testing.assert_close(after, before, atol=0.15, rtol=0)
    assert after[0, 1] > after[0, 2]


def test_smollm2_within_a_gibibyte_gives_the_same_bytes(tmp_path):
    options = ["--ratio", "0.5", "--samples", "2", "--threads", "1", "--eval-tokens", "0", "--quiet"]
    options += ["--include", "*.layers.10.*"]
    code = (
        "import sys; from cospadi_cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
    )
    peaks = {}
    for name, more in (("within", ["--max-memory", "1GiB"]), ("without", [])):
        command = [sys.executable, "-c", code, "compress", "-o", str(tmp_path / name), *options, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks[name] = int(done.stdout.split()[-1]) * 1024
    assert peaks["within"] <= 2**30 < peaks["without"]
    for file in sorted((tmp_path / "without").glob("*.safetensors")):
        assert (tmp_path / "within" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "within" / "run.json").read_text())["predicted_memory"]["peak"] <= 2**30
