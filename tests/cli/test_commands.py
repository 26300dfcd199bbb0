"""eval, inspect, generate, decompress and the lists, on the checkpoint of the tiny model."""

import json

import pytest
import torch
from cospadi_cli.console import size

from tests.cli.conftest import error_line


def test_eval_compares_with_a_baseline(run, tiny_model, compressed, home):
    lines = [{"prompt": "The sky is", "choices": ["blue", "a fish"], "answer": i % 2} for i in range(4)]
    (home / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    options = ["--tokens", 96, "--window", 32, "--choices", "questions.jsonl"]
    result = run("eval", compressed, "--baseline", tiny_model, *options, "--json")
    assert result.exit_code == 0, result.output
    both = json.loads(result.stdout)
    assert both["compressed"]["perplexity"]["n_tokens"] == 93
    assert both["compressed"]["choices"]["n_questions"] == 4
    assert both["perplexity_ratio"] != 1
    alone = json.loads(run("eval", tiny_model, *options, "--json").stdout)
    assert alone["baseline"] is None
    assert alone["compressed"] == both["baseline"]  # the dense model, measured in the same way
    table = run("eval", compressed, "--baseline", tiny_model, *options).stdout
    for words in ("token perplexity", "93 tokens in windows of 32, in float32; 4 questions", "multiple choice"):
        assert words in table


def test_eval_within_a_limit_finds_the_same(run, tiny_model, compressed):
    options = ["--tokens", 96, "--window", 32, "--json"]
    whole = json.loads(run("eval", compressed, "--baseline", tiny_model, *options).stdout)
    result = run("eval", compressed, "--baseline", tiny_model, *options, "--max-memory", "64GiB", "--quiet")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == whole
    assert whole["compressed"]["perplexity"] != whole["baseline"]["perplexity"]


def test_eval_refuses_a_limit_that_is_too_low_and_questions_within_one(run, compressed):
    low = run("eval", compressed, "--tokens", 64, "--window", 32, "--max-memory", "1MiB", "--quiet")
    assert "max_memory 0.00 GiB is too little" in error_line(low)
    both = ["--max-memory", "64GiB", "--choices", "embedded", "--tokens", 64, "--window", 32, "--quiet"]
    assert "multiple choice" in error_line(run("eval", compressed, *both))


def test_inspect_lists_every_group_and_names_the_worst(run, compressed):
    report = json.loads((compressed / "report.json").read_text())
    shown = json.loads(run("inspect", compressed, "--json").stdout)
    assert shown["groups"] == report["groups"]
    text = run("inspect", compressed).stdout
    members = [member for row in report["groups"] for member in row["members"]]
    for member in members:
        assert member["name"] in text
    worst = max(members, key=lambda member: member["relative_error"])
    after_heading_and_columns = text[text.index("Worst layers") :].split("\n")[2:]
    assert after_heading_and_columns[0].split()[0] == worst["name"]


def test_inspect_without_a_report_counts_the_same_bytes(run, fresh):
    report = json.loads((fresh / "report.json").read_text())
    (fresh / "report.json").unlink()
    shown = json.loads(run("inspect", fresh, "--json").stdout)
    for row, expected in zip(shown["groups"], report["groups"], strict=True):
        for key in ("name", "in_features", "n_atoms", "n_nonzero", "bytes", "dense_bytes"):
            assert row[key] == expected[key], key
        assert [m["name"] for m in row["members"]] == [m["name"] for m in expected["members"]]
    assert run("inspect", fresh).exit_code == 0


@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_generate_is_deterministic(run, tiny_model, compressed, which):
    path = tiny_model if which == "dense" else compressed
    command = ["generate", path, "--prompt", "It was", "--max-new-tokens", 8, "--json"]
    first = run(*command)
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["continuation"]
    assert run(*command).stdout == first.stdout
    assert run(*command[:-1]).stdout.startswith("It was")


def test_decompress_gives_a_dense_model_with_the_same_outputs(run, compressed, home):
    import transformers as tf

    import cospadi

    result = run("decompress", compressed, "-o", "dense")
    assert result.exit_code == 0, result.output
    dense = tf.AutoModelForCausalLM.from_pretrained(home / "dense", dtype=torch.float32)
    assert getattr(dense.config, "quantization_config", None) is None
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected = cospadi.load(compressed, dtype=torch.float32)(input_ids=ids).logits
        # The dense weights are rounded to bfloat16 once more.
        torch.testing.assert_close(dense(input_ids=ids).logits, expected, rtol=0.05, atol=0.02)
    assert run("generate", "./dense", "--prompt", "It was").exit_code == 0
    assert run("decompress", compressed, "-o", "dense").exit_code == 2


@pytest.mark.parametrize("kind", ["solvers", "backends", "formats"])
def test_lists_say_what_can_run_and_why_not(run, kind):
    rows = json.loads(run(kind, "list", "--json").stdout)
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    text = run(kind, "list").stdout
    for row in rows:
        assert row["name"] in text
        assert row["description"], row["name"]
        assert bool(row["reason"]) == (not row["available"])
    assert any(row["available"] for row in rows)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (92_871_040, "92.87 MB"), (2.5e12, "2500.00 GB")],
)
def test_sizes_are_decimal(n_bytes, text):
    assert size(n_bytes) == text
