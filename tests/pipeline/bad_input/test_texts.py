"""Calibration texts and tokenizers that do not fit."""

import tracemalloc

import pytest
import torch

from cospadi.calibration.data import open_text, read_text, token_windows
from cospadi.errors import UsageError
from cospadi.pipeline.stages import compress
from tests import helpers
from tests.pipeline.bad_input.common import Tokenizer, nothing_begun, recipe, refused, run


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
