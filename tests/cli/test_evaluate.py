"""eval and the closing evaluation of compress within a limit on memory."""

import json

from tests.cli.conftest import compress_command, error_line


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


def test_compress_within_a_limit_reports_the_same_perplexities_and_no_sample(run, tiny_model, compressed, home):
    command = compress_command(tiny_model, "out", "--max-memory", "64GiB", "--events", "events.jsonl")
    result = run(*command)
    assert result.exit_code == 0, result.output
    expected = json.loads((compressed / "report.json").read_text())["evaluation"]
    found = json.loads((home / "out" / "report.json").read_text())["evaluation"]
    for which in ("baseline", "compressed"):
        assert isinstance(expected[which].pop("sample"), str)
        assert expected[which].pop("note") is None
        assert found[which].pop("sample") is None
        assert "no sample" in found[which].pop("note")
    assert found == expected
    events = map(json.loads, (home / "events.jsonl").read_text().splitlines())
    told = [event for event in events if event["event"] == "evaluated"]
    assert told[0]["done"] == 0
    assert told[-1]["done"] == told[-1]["total"] == 2  # a batch of each model
    assert [event["work_done"] for event in told] == sorted(event["work_done"] for event in told)
