"""Models, texts and places that are not as they should be: one clear line, and nothing that looks like a result."""

import json
import os
import re
import shutil
import struct
import sys
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from cospadi.calibration.data import open_text, read_text, token_windows
from cospadi.config import CalibrationConfig, CompressionConfig
from cospadi.errors import CheckpointError, CospadiError, NumericalError, UnavailableError, UsageError
from cospadi.execution import Execution
from cospadi.formats.checkpoint import INDEX
from cospadi.formats.headers import read_headers
from cospadi.lock import Lock
from cospadi.models import read_config
from cospadi.opening import refuse_absurd_sizes
from cospadi.pipeline import compress
from cospadi.work import WORK
from tests import helpers
from tests.helpers import VOCABULARY, tiny_model

NAN, INF = float("nan"), float("inf")
STREAMED = Execution(max_memory=2**40, threads=1)
WHOLE = Execution(threads=1)
BLOCKS = "model.layers"


class Tokenizer:
    """Gives the bytes of a text, modulo the vocabulary, and counts what it was given."""

    def __init__(self, vocabulary=VOCABULARY):
        self.vocabulary, self.characters = vocabulary, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return {"input_ids": [byte % self.vocabulary for byte in text.encode()]}

    def save_pretrained(self, folder):
        pass


def recipe(calibration=None, **more):
    more = {"solver": "htp", "solver_options": {"n_iter": 2}, "ratio": 0.3} | more
    more = {"allocation": "uniform", "column_weights": False} | more
    calibration = {"batch_size": 2, "samples": 4, "seq_len": 16} | (calibration or {})
    return CompressionConfig(calibration=CalibrationConfig(**calibration), **more)


def run(model, out, config=None, execution=STREAMED, windows="random", tokenizer=None, **more):
    windows = helpers.token_windows(4, 16) if isinstance(windows, str) else windows
    tokenizer = tokenizer or Tokenizer()
    return compress(model, out, config or recipe(), windows=windows, tokenizer=tokenizer, execution=execution, **more)


def refused(error, words, model, out, config=None, execution=STREAMED, **more):
    """Expect an error of one line with these words, and no more than the records of an unfinished run."""
    before = sorted(out.iterdir()) if out.is_dir() else []
    with pytest.raises(error) as caught:
        run(model, out, config, execution, **more)
    assert isinstance(caught.value, CospadiError)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 900
    for word in words:
        assert word in message
    if out.is_dir():
        assert sorted(path for path in out.iterdir() if path.name != WORK) == [p for p in before if p.name != WORK]
    return message


def nothing_begun(out):
    return not out.exists()


def save(model, folder, dtype=torch.float32, shard="10MB", change=None):
    model = model.to(dtype)
    if change is not None:
        with torch.no_grad():
            change(model)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    return save(tiny_model("llama"), tmp_path_factory.mktemp("dense") / "model", shard="30KB")


@pytest.fixture
def folder(saved, tmp_path):
    """A sound model in shards, which a test may damage."""
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_the_model_that_the_others_are_made_of_is_compressed(folder, out):
    assert len(list(folder.glob("*.safetensors"))) > 2
    run(folder, out)
    assert (out / "config.json").exists()


# Numbers


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed folder", "object"])
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("name", [f"{BLOCKS}.1.mlp.up_proj", f"{BLOCKS}.0.input_layernorm", "lm_head"])
def test_a_weight_that_is_not_finite_is_named_before_anything_is_written(tmp_path, out, name, value, streamed):
    def change(model):
        model.get_parameter(f"{name}.weight").view(-1)[7] = value

    model = tiny_model("llama")
    folder = save(model, tmp_path / "model", torch.bfloat16, change=change)
    refused(
        NumericalError, [f"{name}.weight holds NaN or infinity"], folder if streamed else model, out, execution=STREAMED
    )
    assert nothing_begun(out)


def infinite_attention(model):
    for kind in ("q_proj", "k_proj"):
        model.get_parameter(f"{BLOCKS}.1.self_attn.{kind}.weight").normal_(0, 1e20)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
@pytest.mark.parametrize("column_weights", [False, True], ids=["Grams", "gradients"])
@pytest.mark.parametrize("execution", [STREAMED, WHOLE], ids=["streamed", "whole"])
def test_activations_that_turn_nan_in_the_middle_name_the_layer(tmp_path, out, order, column_weights, execution):
    folder = save(tiny_model("llama"), tmp_path / "model", change=infinite_attention)
    config = recipe({"order": order}, column_weights=column_weights)
    message = refused(NumericalError, [f"{BLOCKS}.1.self_attn.o_proj", "NaN"], folder, out, config, execution)
    again = refused(NumericalError, [], folder, out, config, execution, resume=True)
    assert again == message
    refused(UsageError, ["add --resume", "or delete it"], folder, out, config, execution)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "float16"])
def test_products_that_overflow_in_a_float16_model_name_the_layer(tmp_path, out, value_dtype):
    def change(model):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            model.get_parameter(f"{BLOCKS}.0.mlp.{kind}.weight").fill_(6e4)
        model.get_parameter(f"{BLOCKS}.0.post_attention_layernorm.weight").fill_(100)

    folder = save(tiny_model("llama"), tmp_path / "model", torch.float16, change=change)
    words = [f"{BLOCKS}.0.mlp.down_proj", "overflows float32"]
    refused(NumericalError, words, folder, out, recipe(value_dtype=value_dtype))


def test_the_largest_weights_of_float16_are_no_trouble(tmp_path, out):
    def change(model):
        model.get_parameter(f"{BLOCKS}.0.mlp.up_proj.weight").mul_(65504 / 0.1).clamp_(-65504, 65504)

    folder = save(tiny_model("llama"), tmp_path / "model", torch.float16, change=change)
    report = run(folder, out, recipe(value_dtype="float16"))
    assert all(torch.isfinite(t).all() for t in load_file(out / "model.safetensors").values() if t.is_floating_point())
    assert 0 < report["totals"]["mean_relative_error"] < 1


KNAPSACK = {"allocation": "knapsack", "column_weights": True, "rho": 2.0}


@pytest.mark.parametrize("more", [{}, KNAPSACK], ids=["uniform", "knapsack"])
def test_zeros_where_there_should_be_numbers_are_told_in_the_report(tmp_path, out, more):
    def change(model):
        model.get_parameter(f"{BLOCKS}.0.self_attn.o_proj.weight").zero_()
        model.get_parameter(f"{BLOCKS}.0.input_layernorm.weight")[5] = 0
        model.get_parameter(f"{BLOCKS}.1.input_layernorm.weight").zero_()

    folder = save(tiny_model("llama"), tmp_path / "model", change=change)
    report = run(folder, out, recipe(**more, include=("*self_attn*",)))
    rows = {member["name"]: row for row in report["groups"] for member in row["members"]}
    errors = {member["name"]: member["relative_error"] for row in report["groups"] for member in row["members"]}
    if f"{BLOCKS}.0.self_attn.q_proj" in rows:
        row = rows[f"{BLOCKS}.0.self_attn.q_proj"]
        assert row["note"] == "1 input features are always zero"
        assert row["damping"] > 0
    if f"{BLOCKS}.1.self_attn.q_proj" in rows:
        assert "all calibration inputs are zero" in rows[f"{BLOCKS}.1.self_attn.q_proj"]["note"]
    assert any(row["note"] for row in rows.values())
    assert errors.get(f"{BLOCKS}.0.self_attn.o_proj", 0.0) == 0
    assert all(0 <= error < 1 for error in errors.values())


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_fewer_tokens_than_features_are_damped_and_the_rows_say_so(folder, out, order):
    report = run(folder, out, recipe({"order": order}), windows=helpers.token_windows(1, 10))
    for row in report["groups"]:
        assert row["note"].startswith(f"only 10 tokens for {row['in_features']} features")
        assert 0 < row["damping"] <= 0.1


@pytest.mark.parametrize("more", [{}, {**KNAPSACK, "allocation": "equal-ratio"}], ids=["uniform", "equal-ratio"])
def test_an_expert_without_tokens_is_compressed_and_its_row_says_so(tmp_path, out, more):
    def change(model):  # a router that never chooses expert 3
        for block in model.model.layers:
            block.mlp.gate.weight[3] = 0
            block.mlp.gate.weight[:3] = 10 * block.mlp.gate.weight[:3].abs() + 1
        model.model.embed_tokens.weight.abs_()

    folder = save(tiny_model("qwen3-moe"), tmp_path / "model", change=change)
    config = recipe(include=("*layers.0.*experts*",), **more)
    report = run(folder, out, config, windows=helpers.token_windows(1, 8))
    silent = {row["name"] for row in report["groups"] if row["note"].startswith("no calibration token reached")}
    assert f"{BLOCKS}.0.mlp.experts.gate_up.3" in silent


# Files of the model


def rewrite(folder, change):
    """Change the tensors of every shard."""
    for path in folder.glob("*.safetensors"):
        save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def test_tensors_of_mixed_dtypes_are_those_of_the_config(folder, out):
    rewrite(folder, lambda name, tensor: tensor.bfloat16() if "mlp" in name else tensor.half())
    run(folder, out)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_whole_numbers_in_place_of_weights_are_refused_as_quantised(folder, out):
    rewrite(folder, lambda name, tensor: tensor.to(torch.int8) if name.endswith("1.mlp.up_proj.weight") else tensor)
    refused(CheckpointError, [f"{BLOCKS}.1.mlp.up_proj.weight", "torch.int8", "quantised"], folder, out)


def edit(folder, name, change):
    path = folder / name
    data = json.loads(path.read_text())
    path.write_text(json.dumps(change(data) or data))


def shard_of(folder, name):
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


UP = f"{BLOCKS}.1.mlp.up_proj.weight"


def test_a_shard_that_the_index_names_and_that_is_missing(folder, out):
    path = shard_of(folder, UP)
    path.unlink()
    refused(CheckpointError, [path.name, "missing"], folder, out)
    assert nothing_begun(out)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "..", ""])
def test_an_index_that_leaves_the_folder(folder, out, name):
    shutil.copyfile(shard_of(folder, UP), folder.parent / "outside.safetensors")
    edit(folder, INDEX, lambda data: data["weight_map"].update({UP: name}))
    refused(CheckpointError, ["leaves the folder"], folder, out)


def test_a_shard_that_is_a_link_out_of_the_folder(folder, out, tmp_path):
    path = shard_of(folder, UP)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(CheckpointError, [path.name, "link that leaves the folder"], folder, out)


def header(**entry):
    def change(path):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        parsed = json.loads(data[8 : 8 + length])
        parsed[UP].update(entry)
        text = json.dumps(parsed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return change


DAMAGE = {
    "a header as long as nothing": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
    "a shape of 2^62": header(shape=[2**62, 2]),
    "a product of sides that wraps around": header(shape=[2**32, 2**32]),
    "offsets beyond the file": header(data_offsets=[2**40, 2**40 + 6144]),
    "negative offsets": header(data_offsets=[-6144, 0]),
    "a file cut off": lambda path: os.truncate(path, path.stat().st_size - 100),
    "a file of three bytes": lambda path: os.truncate(path, 3),
    "an empty file": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_shard_is_named(folder, out, what):
    path = shard_of(folder, UP)
    DAMAGE[what](path)
    refused(CheckpointError, [path.name], folder, out)
    assert nothing_begun(out)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_pickles_are_not_read(folder, out, name):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(UsageError, [name, "pickle", "safetensors"], folder, out)


# config.json


@pytest.fixture
def hostile_code(folder, tmp_path):
    """Modules in the model's folder that leave a mark when they run."""
    mark = tmp_path / "code-was-run"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    yield
    assert not mark.exists()


AUTO_MAP = {
    "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"}
}


@pytest.mark.usefixtures("hostile_code")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "evil", **AUTO_MAP}, ["'evil'", "code from a model's folder is never run"]),
        ({"model_type": "evil"}, ["'evil'"]),
        ({"model_type": None, **AUTO_MAP}, ["None"]),
        ({"architectures": ["EvilForCausalLM"], **AUTO_MAP}, ["'EvilForCausalLM'", "is never run"]),
        ({"architectures": ["torch"]}, ["'torch'"]),
        ({"architectures": ["../evil\n\x1b[2J"]}, ["architecture"]),
    ],
)
def test_a_model_that_needs_its_own_code_is_refused(folder, out, change, words):
    edit(folder, "config.json", lambda data: data | change)
    refused(UsageError, words, folder, out)
    assert nothing_begun(out)


@pytest.mark.usefixtures("hostile_code")
def test_a_known_architecture_is_that_of_transformers_and_the_result_asks_for_no_code(folder, out):
    edit(folder, "config.json", lambda data: data | AUTO_MAP)
    run(folder, out)
    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))


@pytest.mark.usefixtures("hostile_code")
def test_a_tokenizer_that_needs_code_is_refused(folder, out):
    described = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["tokenization_evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    with pytest.raises(UsageError, match="no usable tokenizer") as caught:
        compress(folder, out, recipe())
    assert "\n" not in str(caught.value)
    assert nothing_begun(out)


@pytest.mark.parametrize("content", [b"", b"no json", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}'])
def test_a_config_that_is_no_json_object(folder, out, content):
    (folder / "config.json").write_bytes(content)
    refused(CheckpointError, ["config.json"], folder, out)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "big"},
        {"hidden_size": -4},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"num_hidden_layers": "two"},
        {"hidden_act": "evil"},
        {"dtype": "evil"},
        {"dtype": "int8"},
        {"rms_norm_eps": "x"},
        {"rope_parameters": {"rope_type": "evil"}},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["PreTrainedModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": 5},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, before the shapes are compared
def test_values_of_the_wrong_kind(folder, out, change):
    edit(folder, "config.json", lambda data: data | change)
    refused(CheckpointError, [str(folder)], folder, out)
    assert nothing_begun(out)


@pytest.mark.parametrize(
    "key", ["hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers", "head_dim", "num_attention_heads"]
)
@pytest.mark.parametrize("value", [2 * 10**9, 2**62])
def test_absurd_sizes_take_no_memory(folder, out, key, value):
    read_config(folder)  # what importing takes does not count
    edit(folder, "config.json", lambda data: data | {key: value})
    tracemalloc.start()
    try:
        refused(CheckpointError, [], folder, out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * 2**20
    assert nothing_begun(out)


def test_buffers_that_a_model_computes_are_bounded_too(folder):
    """GPT-J, for one, has a table of all positions, which no file holds."""
    tensors = read_headers(folder)
    model = torch.nn.Linear(8, 8, device="meta")
    model.register_buffer("table", torch.empty(2**20, 8, device="meta"), persistent=False)
    refuse_absurd_sizes(folder, model, tensors)
    model.register_buffer("table", torch.empty(2**40, 8, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match="bytes of buffers"):
        refuse_absurd_sizes(folder, model, tensors)


@pytest.mark.parametrize("method", ["gptq", "cospadi", "bitsandbytes"])
def test_a_model_that_is_quantised_or_compressed_already(folder, out, method):
    edit(folder, "config.json", lambda data: data | {"quantization_config": {"quant_method": method, "bits": 4}})
    refused(UsageError, ["already quantised or compressed"], folder, out)
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": method}
    refused(UsageError, ["already quantised or compressed"], model, out, execution=WHOLE)


# Text and tokenizer


def text_run(folder, out, text, tokenizer=None, **calibration):
    config = recipe({"text": str(text), **calibration})
    return config, {"windows": None, "tokenizer": tokenizer or Tokenizer()}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["0 tokens", "fewer than"]),
        (b"short", ["5 tokens", "fewer than 4 window(s) of 16"]),
        (b"fine until here \xff\xfe and on" * 9, ["not UTF-8", "byte 16)"]),
        (b"a" * (2**16 - 1) + "ä".encode() + b"\xe4\n", ["not UTF-8", f"byte {2**16 + 1})"]),
        (b"cut off: \xc3", ["not UTF-8", "byte 9)"]),
    ],
)
def test_a_text_that_is_none(folder, out, tmp_path, content, words):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    config, more = text_run(folder, out, text, samples=4 if len(content) < 1000 else 8000)
    refused(UsageError, words, folder, out, config, **more)
    assert nothing_begun(out)


def test_a_text_that_cannot_be_read(folder, out, tmp_path):
    for text in (tmp_path / "absent.txt", tmp_path):
        config, more = text_run(folder, out, text)
        refused(UsageError, [str(text), "cannot be read"], folder, out, config, **more)


@pytest.mark.parametrize("lines", [True, False], ids=["lines", "one line"])
def test_of_a_huge_text_a_prefix_is_taken(folder, out, tmp_path, lines):
    text = tmp_path / "huge.txt"
    with text.open("wb") as file:
        file.write(b"some words and an end\n" * 100_000 if lines else b"some words " * 200_000)
        file.truncate(100 * 2**20)  # zeros, which are characters too
    tokenizer = Tokenizer()
    config, more = text_run(folder, out, text, tokenizer, samples=2)
    tracemalloc.start()
    try:
        run(folder, out, config, **more)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tokenizer.characters <= 1_000_000
    assert peak < 40 * 2**20


def test_a_text_is_the_same_in_one_piece_and_in_parts(tmp_path):
    text = "".join(f"line {i} äöü {'x' * (i % 400)}\r\n" for i in range(3000)) * 3
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    expected = text.replace("\r\n", "\n")
    assert read_text(path) == expected
    assert len(list(open_text(path))) > 3
    given = []

    def tokenizer(chunk, **options):
        given.append(chunk)
        return {"input_ids": list(chunk.encode())}

    whole = token_windows(tokenizer, expected, 64)
    chunks = given.copy()
    assert "".join(chunks) == expected
    assert all(chunk.startswith("\n") for chunk in chunks[1:])
    given.clear()
    assert torch.equal(token_windows(tokenizer, open_text(path), 64), whole)
    assert given == chunks


def test_a_tokenizer_of_another_model(folder, out, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("~" * 1000)
    config, more = text_run(folder, out, text, Tokenizer(1000))
    refused(UsageError, ["token 126", "vocabulary of 96", "wrong tokenizer"], folder, out, config, **more)


@pytest.mark.parametrize("content", [None, '{"a": 1}', "[]", '{"added_tokens": [], "model": {"type": "Evil"}}', "{"])
def test_a_tokenizer_that_is_missing_or_damaged(folder, out, content):
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError, match="no usable tokenizer") as caught:
        compress(folder, out, recipe())
    assert "\n" not in str(caught.value)
    assert nothing_begun(out)


def test_windows_longer_than_the_model_has_positions(folder, out):
    words = ["seq_len 65", "64 positions"]
    refused(UsageError, words, folder, out, windows=helpers.token_windows(1, 65))


@pytest.mark.parametrize("patterns", [{"include": ("*nope*",)}, {"exclude": ("*nope*",)}, {"include": ("*norm",)}])
def test_patterns_that_match_no_layer(folder, out, patterns):
    (pattern,) = next(iter(patterns.values()))
    refused(UsageError, [f"pattern '{pattern}' matches"], folder, out, recipe(**patterns))
    assert nothing_begun(out)


# Places and processes


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="a read-only place that even root cannot write")
def test_an_output_that_cannot_be_written(folder):
    from pathlib import Path

    refused(UsageError, ["/proc/result", "cannot be used"], folder, Path("/proc/result"))


def test_an_output_that_is_a_file(folder, out):
    out.write_text("mine")
    refused(UsageError, ["is a file"], folder, out)
    assert out.read_text() == "mine"


def test_an_output_in_the_models_folder(folder, tmp_path):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    refused(UsageError, ["already holds a model"], folder, folder)
    refused(UsageError, ["already holds a model"], folder, folder, resume=True)
    for inside in (folder / "out", folder / "deep" / "out", folder / ".." / folder.name / "out"):
        refused(UsageError, ["lies in the folder of a model", str(folder)], folder, inside)
    (tmp_path / "link").symlink_to(folder)
    refused(UsageError, ["lies in the folder of a model"], folder, tmp_path / "link" / "out")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_two_runs_in_one_folder(folder, out):
    class Stop(Exception):
        pass

    def stop(event):
        if type(event).__name__ == "Planned":
            raise Stop

    with pytest.raises(Stop):
        run(folder, out, on_event=stop)
    lock = Lock(out / WORK / "lock")
    for resume in (False, True):
        refused(UsageError, ["in use by process", str(os.getpid())], folder, out, resume=resume)
    lock.release()
    run(folder, out, resume=True)


def test_a_cache_that_is_a_file(folder, out, tmp_path):
    (tmp_path / "cache").write_text("mine")
    refused(CospadiError, [str(tmp_path / "cache")], folder, out, cache=tmp_path / "cache")
    assert (tmp_path / "cache").read_text() == "mine"
    run(folder, out, resume=True)


@pytest.mark.parametrize("what", ["workers", "threads", "max_memory"])
@pytest.mark.parametrize("value", [0, -1])
def test_less_than_one(what, value):
    with pytest.raises(UsageError, match=re.escape(f"{what}={value}: expected at least 1")):
        Execution(**{what: value})


def test_too_little_memory_says_how_much_is_needed(folder, out):
    refused(UsageError, ["too little", "needs at least"], folder, out, execution=Execution(max_memory=2**20))
    assert nothing_begun(out)


def test_ray_that_is_not_installed(folder, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(UnavailableError, ["ray"], folder, out, execution=Execution(executor="ray"))


def test_an_object_for_several_workers(out):
    refused(UsageError, ["save it"], tiny_model("llama"), out, execution=Execution(workers=2))
    assert nothing_begun(out)


def test_refusing_is_quick(folder, out):
    """Nothing is asked of the network when a folder is damaged."""
    begin = time.perf_counter()
    (folder / "config.json").unlink()
    refused(UsageError, ["not a model folder", "config.json"], folder, out)
    refused(UsageError, ["no such folder"], folder / "absent" / "x", out)
    assert time.perf_counter() - begin < 10
