"""Bad input on the command line: one line, exit code 2 for what was asked and 1 for what is broken, no result."""

import json
import os
import shutil
import sys
import tracemalloc

import pytest
from safetensors.torch import load_file, save_file

from cospadi.files.lock import Lock
from cospadi.pipeline.work_folder import WORK
from tests.cli.conftest import compress_command, error_line


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture
def refused(run, model, tmp_path):
    """Compress the model and expect an error line with some words, and no result."""

    def invoke(code, words, *more, out=None):
        out = out or tmp_path / "out"
        result = run(*compress_command(model, out, "--quiet", *more))
        line = error_line(result, code)
        for word in words:
            assert word in line
        assert "Traceback" not in result.output
        if out.is_dir():
            assert {path.name for path in out.iterdir()} <= {WORK}
        return line

    return invoke


def edit_config(model, **values):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_broken_files_leave_with_1(refused, model):
    path = model / "model.safetensors"
    whole, name = path.read_bytes(), "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[name][3, 4] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    refused(1, [name, "NaN"])
    path.write_bytes(whole[:-10])
    refused(1, ["model.safetensors", "ends at byte"])
    path.unlink()
    refused(1, ["model.safetensors", "is missing"])
    (model / "config.json").write_text("{")
    refused(1, ["config.json", "not valid JSON"])


def test_code_in_a_model_folder_leaves_with_2_and_is_not_run(refused, model, tmp_path):
    mark = tmp_path / "code-was-run"
    (model / "modeling_evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    edit_config(model, model_type="evil", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
    refused(2, ["'evil'", "code from a model's folder is never run"])
    assert not mark.exists()


def test_a_missing_tokenizer_leaves_with_2(refused, model):
    for path in model.glob("tokenizer*"):
        path.unlink()
    refused(2, ["no usable tokenizer"])


def test_evaluation_texts_that_cannot_be_used_leave_with_2(refused, tmp_path):
    text = tmp_path / "text.txt"
    for content, words in ((b"", ["0 tokens"]), (b"text \xff\xfe", ["not UTF-8"])):
        text.write_bytes(content)
        refused(2, words, "--eval-text", text)
    refused(2, ["cannot be read"], "--eval-text", tmp_path)


def test_a_huge_text_is_not_read_to_its_end(refused, model, tmp_path):
    text = tmp_path / "huge.txt"
    with text.open("wb") as file:
        file.write(b"some words and an end\n" * 20_000)
        file.truncate(100 * 2**20)
    (model / "model.safetensors").unlink()  # what is noticed next
    refused(1, ["is missing"])
    tracemalloc.start()
    try:
        refused(1, ["is missing"], "--calibration", text, "--eval-text", text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30 * 2**20


def test_places_that_cannot_be_used_leave_with_2(refused, model, tmp_path):
    refused(2, ["lies in the folder of a model"], out=model / "out")
    (tmp_path / "file").write_text("mine")
    refused(2, ["is a file"], out=tmp_path / "file")


def test_a_folder_in_use_names_the_process(refused, tmp_path):
    (tmp_path / "out" / WORK).mkdir(parents=True)
    lock = Lock(tmp_path / "out" / WORK / "lock")
    try:
        for more in ([], ["--resume"]):
            refused(2, [f"in use by process {os.getpid()}"], *more)
    finally:
        lock.release()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], ["--workers", "x>=1"]),
        (["--max-memory", "0"], ["size '0'", "8GiB"]),
        (["--max-memory", "1MiB"], ["too little", "needs at least"]),
        (["--samples", "0"], ["samples=0", "greater than or equal to 1"]),
        (["--seq-len", "129", "--eval-tokens", "0"], ["seq_len 129", "128 positions"]),
        (["--include", "*nope*"], ["'*nope*' matches nothing"]),
        (["--ray-address", "auto"], ["executor 'ray'"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_values_out_of_range_leave_with_2(refused, arguments, words):
    refused(2, words, *arguments)


def test_ray_that_is_not_installed_leaves_with_2(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    refused(2, ["ray"], "--executor", "ray")
