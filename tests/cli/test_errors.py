"""Mistakes of the user: each gives one clear line and exit code 2, before anything is loaded."""

import pytest
from cospadi_cli import main as module

from tests.cli.conftest import compress_command, error_line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compres"], ["unknown command 'compres'", "did you mean 'compress'?"]),
        (["compress", "--ratoi", "0.2"], ["--ratoi", "--ratio", "compress --help"]),
        (["compress", "--ratio", "1.5"], ["ratio=1.5", "less than 1"]),
        (["compress", "--ratio", "much"], ["'--ratio'", "'much' is not a valid float"]),
        (["compress", "--convention", "nice"], ["'nice' is not one of 'honest', 'paper'"]),
        (["compress", "--groups", "consecutive:0"], ["groups='consecutive:0'", "consecutive:N with N >= 1"]),
        (["compress", "--solver", "orthogonol"], ["unknown solver 'orthogonol'", "did you mean 'orthogonal'?"]),
        (["compress", "--solver-option", "n_iter"], ["'n_iter'", "expected KEY=VALUE"]),
        (["compress", "--solver", "htp", "--solver-option", "depth=3"], ["'htp' has no option 'depth'", "known:"]),
        (["compress", "--solver", "htp", "--solver-option", "n_iter=many"], ["n_iter='many'", "integer"]),
        (["compress", "--solver", "htp", "--format", "zip"], ["unknown format 'zip'", "bitmask"]),
        (["compress", "--solver", "svd", "--format", "bitmask"], ["'svd' has dense coefficients", "use dense"]),
        (["compress", "--solver", "htp", "--backend", "cudda"], ["unknown backend 'cudda'", "did you mean 'cuda'?"]),
        (["compress", "--recipe", "absent.yaml"], ["absent.yaml", "cannot be read"]),
        (["compress", "--calibration", "absent.txt", "--solver", "htp"], ["'absent.txt' cannot be read"]),
        (["compress", "--eval-text", "absent.txt", "--solver", "htp"], ["'absent.txt' cannot be read"]),
        (["compress", "./absent", "--solver", "htp"], ["./absent", "no such folder"]),
        (["compress", ".", "--solver", "htp"], ["not a model folder", "config.json"]),
        (["eval", "./absent"], ["./absent", "no such folder"]),
        (["eval", "."], ["not a model folder", "config.json"]),
        (["eval", ".", "--choices", "absent.jsonl"], ["'absent.jsonl' cannot be read"]),
        (["generate", "."], ["Missing option '--prompt'"]),
        (["inspect", "./absent"], ["absent", "no such folder"]),
        (["inspect", "."], ["not a model folder", "config.json"]),
        (["decompress", ".", "-o", "out"], ["not a model folder", "config.json"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) and " " not in value[0] else "",
)
def test_mistakes_give_one_line(run, arguments, words):
    line = error_line(run(*arguments))
    for word in words:
        assert word in line


def test_cupy_without_a_gpu_is_refused_before_anything_is_loaded(run, monkeypatch, home):
    from cospadi.arrays import cuda_availability, cupy_availability
    from cospadi.models import embedded

    if cupy_availability() and cuda_availability():
        pytest.skip("this machine can run cupy and CUDA")
    monkeypatch.setattr(embedded, "embedded_model", lambda: pytest.fail("the model was loaded first"))
    line = error_line(run("compress", "--solver", "ksvd-cupy", "--backend", "cuda"))
    assert "ksvd-cupy" in line
    assert "cupy" in line
    assert list(home.iterdir()) == []


def test_a_backend_that_cannot_run_is_refused(run):
    from cospadi.arrays import cuda_availability

    if cuda_availability():
        pytest.skip("this machine has a GPU")
    line = error_line(run("compress", "--solver", "htp", "--backend", "cuda"))
    assert "backend 'cuda' cannot run here: " in line


def test_texts_shorter_than_a_window_are_refused(run, tiny_model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words.", encoding="utf-8")
    for option in ("--eval-text", "--calibration"):
        line = error_line(run(*compress_command(tiny_model, "out", option, short, "--quiet")))
        assert "fewer than" in line
        assert "of 32" in line
    assert "of 32" in error_line(run("eval", tiny_model, "--text", short, "--window", 32, "--tokens", 64))
    line = error_line(run("eval", tiny_model, "--window", 32, "--tokens", 16))
    assert "fewer than one window of 32" in line


def test_a_used_output_folder_is_refused_before_anything_is_loaded(run, tiny_model, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "mine.txt").write_text("keep me")
    line = error_line(run(*compress_command("./absent-model", used)))
    assert "not empty" in line
    assert (used / "mine.txt").read_text() == "keep me"


def test_a_dense_model_is_no_checkpoint(run, tiny_model):
    assert "dense model" in error_line(run("inspect", tiny_model))
    assert "dense model" in error_line(run("decompress", tiny_model, "-o", "dense"))


def test_a_compressed_model_is_not_compressed_again(run, compressed):
    line = error_line(run(*compress_command(compressed, "again", "--quiet")))
    assert "already" in line


def test_questions_with_a_bad_line_are_refused(run, tiny_model, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": 5}\n')
    assert "line 1: answer must be an index from 0 to 1" in error_line(run("eval", tiny_model, "--choices", path))


def test_other_failures_leave_with_1(run, fresh):
    (fresh / "report.json").write_text("{")
    assert "report.json" in error_line(run("inspect", fresh), code=1)


def test_a_multi_line_message_becomes_one_line(run, monkeypatch):
    from cospadi.errors import NumericalError

    @module.main.command("fail")
    def fail():
        raise NumericalError("first\n  second")

    try:
        assert error_line(run("fail"), code=1) == "Error: first second"
    finally:
        del module.main.commands["fail"]
