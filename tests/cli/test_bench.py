"""``bench`` and ``tune``: what they print and store, and which mistakes they refuse; no test looks at times."""

import json
from dataclasses import fields, replace

import pytest
import torch
from cospadi_cli.commands.bench import command_of

from cospadi.backends import tuning
from cospadi.backends.base import BACKENDS
from cospadi.backends.cpu import runtime as cpu_backend
from cospadi.evaluation import speed
from cospadi.evaluation.speed import contenders, crossover, single_layers, whole_models
from cospadi.evaluation.speed.peak_memory import PeakMemory
from tests.cli.conftest import error_line

TINY = ["--shape", "64,48", "--tokens", "1,4", "--repeats", 2, "--dtype", "float32", "--backend", "torch"]
RECORD = {"command", "date", "machine", "versions", "seed", "settings", "method", "rows"}


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """The kernels of the CPU, once and in the cache that all tests share, before each test gets a home of its own."""
    return BACKENDS.availability("cpu")


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """The rates of a machine, which are not worth measuring, and few copies."""
    monkeypatch.setattr(single_layers, "bandwidth", lambda device: 1e10)
    monkeypatch.setattr(single_layers, "product_rate", lambda device, dtype: 1e11)
    for module in (contenders, crossover):
        monkeypatch.setattr(module, "n_copies", lambda *_: 2)


# Layers


def test_layers_are_shown_as_json_and_as_a_table(run):
    figures = json.loads(run("bench", *TINY, "--json", "--quiet").stdout)
    assert figures.keys() >= RECORD | {"rates", "skipped", "dispatch", "chosen"}
    assert [(row["n_tokens"], row["contender"]) for row in figures["rows"]] == [
        (n_tokens, name) for n_tokens in (1, 4) for name in (contenders.DENSE, "torch")
    ]
    assert set(figures["rows"][0]) == {field.name for field in fields(speed.LayerRow)}
    for row in figures["rows"]:
        assert 0 < row["low"] <= row["microseconds"] <= row["high"]
    assert figures["settings"]["shapes"] == [[64, 48]]
    result = run("bench", *TINY)
    assert result.exit_code == 0
    for words in ("64x48 -30%", "inputs float32", "vs torch", "dense torch", "Module and operator around torch add"):
        assert words in result.stdout
    assert "64x48 -30%, 4 tokens, float32" in result.stderr


@pytest.fixture
def figures():
    """Figures of one small layer."""
    return speed.measure_layers(
        speed.LayerSettings(((64, 48),), tokens=(1, 4), dtypes=(torch.float32,), backends=("torch",), repeats=2)
    )


def test_a_table_is_whole_in_a_narrow_output_and_says_where_a_backend_is_slower(run, figures, monkeypatch):
    rows = [replace(row, verdict="") for row in figures.rows]
    odd = {"microseconds": 123456.7, "low": 1.0, "high": 999999.9, "times_dense": 1.23, "times_handwritten": 0.91}
    odd |= {"stored_bytes": 63_123_456, "extra_bytes": 33_123_456, "verdict": "slower than own dense"}
    rows[-1] = replace(rows[-1], **odd, gigabytes_per_second=1234.5, contender=contenders.HANDWRITTEN)
    monkeypatch.setattr(speed, "measure_layers", lambda settings, tell: replace(figures, rows=rows))
    (line,) = (line for line in run("bench", *TINY).stdout.splitlines() if "slower than" in line)
    cells = ("123456.7", "x1.23", "x0.91", "63.12 MB", "33.12 MB", "1234.5", "slower than own dense")
    for cell in (contenders.HANDWRITTEN, *cells):
        assert cell in line


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        (["--shapes", "smollm2", "--shape", "8,9"], [(576, 576), (576, 192), (576, 1536), (1536, 576), (8, 9)]),
        (["--shape", "8,9", "--shape", "10,11"], [(8, 9), (10, 11)]),
        ([], [(2048, 2048), (4096, 4096), (4096, 11008)]),
        (["--shapes", "all"], [shape for shapes in speed.LAYER_SHAPES.values() for shape in shapes]),
    ],
    ids=str,
)
def test_options_reach_the_measurement(run, figures, monkeypatch, options, shapes):
    seen = []

    def measure(settings, tell):
        seen.append((settings, torch.get_num_threads()))
        return figures

    monkeypatch.setattr(speed, "measure_layers", measure)
    before = torch.get_num_threads()
    more = ["--ratio", 0.2, "--ratio", 0.5, "--tokens", "3,7", "--dtype", "float16", "--value-dtype", "int8"]
    command = ["bench", *options, *more, "--threads", before + 1, "--seed", 5, "--repeats", 4, "--device", "cpu"]
    result = run(*command, "--json")
    assert result.exit_code == 0, result.output
    ((settings, threads),) = seen
    assert list(settings.shapes) == shapes
    assert (settings.ratios, settings.tokens) == ((0.2, 0.5), (3, 7))
    assert (settings.dtypes, settings.value_dtype) == ((torch.float16,), "int8")
    assert (settings.seed, settings.repeats, settings.device) == (5, 4, torch.device("cpu"))
    assert json.loads(result.stdout)["machine"]["threads"] == threads == before + 1
    assert torch.get_num_threads() == before


def test_the_file_holds_what_a_stored_result_holds_and_no_folders(run, home):
    (home / "sub").mkdir()
    result = run("bench", *TINY, "--quiet", "--out", home / "sub" / "speed.json", "--seed", 3)
    assert result.exit_code == 0, result.output
    text = (home / "sub" / "speed.json").read_text()
    stored = json.loads(text)
    assert stored.keys() >= RECORD
    assert stored["seed"] == 3
    assert stored["command"].startswith("cospadi-cli bench --shape 64,48")
    assert "--out speed.json" in stored["command"]
    assert str(home) not in text


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("cospadi-cli bench a/b/model --json", "cospadi-cli bench model --json"),
        ("cospadi-cli bench --out=/x/y.json --ratio=0.3", "cospadi-cli bench --out=y.json --ratio=0.3"),
        ("cospadi-cli bench --plot '/x/my plot.png'", "cospadi-cli bench --plot 'my plot.png'"),
    ],
)
def test_commands_are_kept_without_folders(typed, kept):
    assert command_of(typed) == kept


def test_a_plot_is_drawn(run, home):
    pytest.importorskip("matplotlib")
    result = run("bench", *TINY, "--quiet", "--plot", "roof.png")
    assert result.exit_code == 0, result.output
    assert (home / "roof.png").read_bytes().startswith(b"\x89PNG")


# Models

FEW = ["--prompt-tokens", 10, "--new-tokens", 2, "--repeats", 2, "--device", "cpu"]


def test_a_model_is_measured_beside_itself_multiplied_out(run, compressed, home):
    options = ["--backend", "reference", "--backend", "auto", *FEW, "--no-memory", "--quiet"]
    result = run("bench", compressed, *options, "--json", "--out", "speed.json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures == json.loads((home / "speed.json").read_text())
    assert figures.keys() >= RECORD | {"baseline", "attention", "chosen"}
    assert [(row["contender"], row["dtype"]) for row in figures["rows"]] == [
        (name, dtype) for dtype in ("bfloat16", "float32") for name in ("dense", "reference", "auto")
    ]
    assert figures["settings"]["model"] == compressed.name
    assert str(compressed.parent) not in (home / "speed.json").read_text()
    for row in figures["rows"]:
        assert row["logits_difference"] < (1e-4 if row["dtype"] == "float32" else 0.1)
        assert row["prefill_tokens_per_second"] > 0
        assert row["peak_bytes"] is None
    assert set(figures["chosen"]) == {"auto, bfloat16", "auto, float32"}
    assert figures["chosen"]["auto, float32"].startswith("auto chose ")


def test_the_table_of_a_model_names_baseline_attention_and_memory(run, compressed, tiny_model, monkeypatch):
    memory = PeakMemory(1_000_000, 2_000_000, 3_000_000, "made up")
    monkeypatch.setattr(whole_models, "peak_in_a_process", lambda *_: memory)
    options = ["--baseline", tiny_model, *FEW, "--dtype", "float32", "--backend", "torch"]
    result = run("bench", compressed, *options)
    assert result.exit_code == 0, result.output
    for words in (
        "prefill tok/s",
        "decode tok/s",
        "x1.00",
        "Dense: tiny. Attention",
        "prompt of 10 tokens, 2 generated",
    ):
        assert words in result.stdout
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("torch"))
    assert "3.00 MB" in row
    assert "memory of torch, float32" in result.stderr


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--shape", "64"], ["'64'", "expected 2 numbers of at least 1"]),
        (["--shape", "a,b"], ["'a,b'", "whole numbers separated by commas"]),
        (["--shapes", "llama"], ["'llama' is not one of 'smollm2', 'standard', 'all'"]),
        (["--tokens", "1,,8"], ["'1,,8'", "whole numbers"]),
        (["--ratio", "1.5"], ["ratio 1.5", "(0, 1)"]),
        (["--shape", "4,4", "--ratio", "0.9"], ["4x4", "too small", "larger shape"]),
        (["--dtype", "float64"], ["'float64' is not one of"]),
        (["--backend", "cudda"], ["unknown backend 'cudda'", "did you mean 'cuda'?"]),
        (["--backend", "torch", "--backend", "torch"], ["given twice"]),
        (["--device", "tpu9"], ["'tpu9'", "cpu, cuda or cuda:N"]),
        (["--device", "meta"], ["'meta'", "cpu, cuda or cuda:N"]),
        (["--out", "absent/speed.json"], ["--out absent/speed.json", "folder that exists"]),
        (["--out", "."], ["--out .", "expected a file"]),
        (["--plot", "absent/roof.png"], ["--plot absent/roof.png", "folder that exists"]),
        (["--baseline", "dense"], ["--baseline is for models: give MODEL"]),
        (["--no-memory"], ["--memory is for models"]),
        (["model", "--shape", "8,8"], ["--shape is for layers: leave it out, or MODEL"]),
        (["model", "--plot", "roof.png"], ["--plot is for layers"]),
        (["./absent"], ["absent", "no such folder"]),
        (["."], ["not a model folder", "config.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and " " not in value[0] else "",
)
def test_mistakes_give_one_line(run, arguments, words):
    line = error_line(run("bench", *arguments, "--quiet"))
    for word in words:
        assert word in line


def test_mistakes_about_models_give_one_line(run, tiny_model, compressed):
    assert "dense model" in error_line(run("bench", tiny_model, "--quiet"))
    line = error_line(run("bench", compressed, "--prompt-tokens", 200, "--no-memory", "--quiet"))
    assert "264 tokens" in line
    assert "context of 128" in line
    assert "no such folder" in error_line(run("bench", compressed, "--baseline", "./absent", "--quiet"))
    line = error_line(run("bench", compressed, "--baseline", "./absent", "--backend", "cudda", "--quiet"))
    assert "unknown backend" in line


def test_hardware_that_is_missing_is_said(run):
    from cospadi.arrays import cuda_availability

    if cuda_availability():
        pytest.skip("this machine has a GPU")
    assert "0 CUDA GPUs" in error_line(run("bench", *TINY[:-2], "--device", "cuda"))
    assert "0 CUDA GPUs" in error_line(run("tune", "--device", "cuda:1"))
    assert "'cuda' cannot run here" in error_line(run("bench", *TINY, "--backend", "cuda", "--quiet"))


def test_a_missing_matplotlib_is_said_before_anything_is_measured(run, monkeypatch):
    from cospadi.evaluation.speed import roofline

    monkeypatch.setattr(speed, "measure_layers", lambda *_: pytest.fail("it was measured first"))
    monkeypatch.setattr(roofline.importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in error_line(run("bench", *TINY, "--plot", "roof.png", "--quiet"))


# Thresholds


@pytest.fixture
def quick(monkeypatch):
    """A small layer and few numbers of tokens."""
    state = BACKENDS.availability("cpu")
    if not state:
        pytest.skip(state.reason)
    monkeypatch.setattr(crossover, "_SHAPES", {"cpu": ((64, 48),)})
    monkeypatch.setattr(crossover, "TOKENS", (1, 4))


def test_tune_stores_what_auto_then_takes(run, quick):
    from cospadi.backends.auto import AutoBackend
    from cospadi.backends.base import Placement

    result = run("tune", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["dtype"] for one in found["entries"]] == ["bfloat16", "float32", "float16"]
    for entry, one in zip(found["entries"], found["measured"], strict=True):
        assert entry["options"] == {"max_tokens": one["value"]}
        assert one["value"] in (0, 1, 4)
        assert set(one["advantage"]) == {"1", "4"}
        chosen = AutoBackend().resolve(Placement(torch.device("cpu"), getattr(torch, one["dtype"])))
        assert chosen == cpu_backend.CpuBackend(max_tokens=one["value"])
    assert "cpu, float16: max_tokens" in result.stderr
    assert json.loads(run("tune", "--show", "--json").stdout) == {"entries": found["entries"], "measured": []}


def test_tune_shows_and_removes(run, quick):
    assert "Nothing is stored" in run("tune", "--show").stdout
    table = run("tune", "--device", "cpu", "--quiet")
    assert table.stderr == ""
    assert "kernel against dense product by tokens: 1: x" in table.stdout
    shown = run("tune", "--show").stdout
    assert shown.count("max_tokens=") == 3
    assert torch.__version__ in shown
    assert run("tune", "--reset").stdout == "Removed.\n"
    assert run("tune", "--reset").stdout == "Nothing is stored.\n"
    assert json.loads(run("tune", "--reset", "--json").stdout) == {"removed": False}
    assert tuning.stored_tuned() == ()


def test_thresholds_hold_for_the_threads_that_were_asked_for(run, quick):
    more = torch.get_num_threads() + 1
    assert run("tune", "--device", "cpu", "--threads", more, "--quiet").exit_code == 0
    assert {one.threads for one in tuning.stored_tuned()} == {more}
    assert tuning.options_for("cpu", torch.device("cpu"), torch.float32) == {}


def test_a_damaged_file_is_shown_as_nothing(run, home):
    tuning.tuning_file().parent.mkdir(parents=True)
    tuning.tuning_file().write_text("{")
    assert "Nothing is stored" in run("tune", "--show").stdout


def test_mistakes_of_tune_give_one_line(run, home, monkeypatch):
    assert "exclude each other" in error_line(run("tune", "--show", "--reset"))
    assert "'--seconds'" in error_line(run("tune", "--seconds", "0"))
    assert "cpu, cuda or cuda:N" in error_line(run("tune", "--device", "meta"))


def test_a_cache_that_cannot_be_written_is_one_line(run, quick, home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setenv("COSPADI_CACHE", str(home / "file"))
    assert "COSPADI_CACHE" in error_line(run("tune", "--device", "cpu", "--quiet"))
