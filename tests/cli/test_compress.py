"""``compress``: what it writes, prints and logs, and which options override which."""

import copy
import itertools
import json

import pytest
import torch
import yaml

from cospadi.calibration.data import read_text
from tests.cli.conftest import compress_command, read_report


def test_writes_a_checkpoint_a_report_and_a_card(compressed):
    report = json.loads((compressed / "report.json").read_text())
    evaluation = report["evaluation"]
    assert evaluation["baseline"]["perplexity"]["n_tokens"] == evaluation["compressed"]["perplexity"]["n_tokens"] == 62
    ratio = evaluation["compressed"]["perplexity"]["token"] / evaluation["baseline"]["perplexity"]["token"]
    assert evaluation["perplexity_ratio"] == pytest.approx(ratio)
    assert isinstance(evaluation["compressed"]["sample"], str)
    assert 0.15 < report["totals"]["ratio"] < 0.3
    card = (compressed / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["cospadi", "compression", "sparse-dictionary"]
    assert not {"base_model", "base_model_relation"} & set(front)  # the tiny model is a folder, not an id of the hub
    assert card.index("import cospadi") < card.index("from_pretrained")
    for number in (report["totals"]["layer_bytes"], report["totals"]["model_bytes"]):
        assert f"{number:,}" in card


def test_the_evaluation_is_that_of_the_model_that_was_written(compressed):
    import cospadi
    from cospadi.calibration.data import EMBEDDED_EVALUATION, token_windows
    from cospadi.evaluation.likelihood import perplexity
    from cospadi.models.dense_model import read_tokenizer

    windows = token_windows(read_tokenizer(compressed), read_text(None, EMBEDDED_EVALUATION), 32, 2)
    measured = perplexity(cospadi.load(compressed, dtype=torch.float32), windows)
    report = json.loads((compressed / "report.json").read_text())
    assert report["evaluation"]["compressed"]["perplexity"]["mean_nll"] == pytest.approx(measured.mean_nll, rel=1e-4)


def test_tables_show_sizes_perplexities_and_how_to_load(compression):
    words = ("compressed layers", "whole model", "paper's count", "token perplexity", "Worst layers", "cospadi.load")
    for word in words:
        assert word in compression.result.stdout
    assert "[1/" in compression.result.stderr  # progress, as plain lines


def test_the_log_and_the_events_tell_of_every_group(compression):
    log = compression.log.read_text()
    assert log.startswith("before\n")  # appended
    assert all(line.isprintable() for line in log.splitlines())
    assert all(line[:4].isdecimal() and line[19] == "Z" for line in log.splitlines()[1:])
    told = [json.loads(line) for line in compression.events.read_text().splitlines()]
    assert all(event["time"].endswith("Z") for event in told)
    assert [event["time"] for event in told] == sorted(event["time"] for event in told)
    finished = [event for event in told if event["event"] == "group_finished"]
    assert log.count(f"/{len(finished)}] ") == len(finished)
    assert [event["done"] for event in finished] == list(range(1, len(finished) + 1))
    rows = compression.report["groups"]
    assert sorted(event["row"]["name"] for event in finished) == sorted(row["name"] for row in rows)
    names = [name for name, _ in itertools.groupby(event["event"] for event in told)]
    assert names[-3:] == ["group_finished", "written", "evaluated"]
    for event in told:
        if "work_done" in event:
            assert 0 <= event["work_done"] <= event["work_total"] * (1 + 1e-9)


def test_within_a_limit_the_report_is_the_same_but_for_the_sample(run, tiny_model, compression, home):
    result = run(*compress_command(tiny_model, "out", "--max-memory", "64GiB", "--json", "--events", "events.jsonl"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)  # pure JSON
    assert report == read_report("out")
    expected = copy.deepcopy(compression.report)
    for which in ("baseline", "compressed"):
        assert isinstance(expected["evaluation"][which].pop("sample"), str)
        assert expected["evaluation"][which].pop("note") is None
        assert report["evaluation"][which].pop("sample") is None
        assert "no sample" in report["evaluation"][which].pop("note")
    assert report == expected
    events = map(json.loads, (home / "events.jsonl").read_text().splitlines())
    told = [event for event in events if event["event"] == "evaluated"]
    assert told[0]["done"] == 0
    assert told[-1]["done"] == told[-1]["total"] == 2  # a batch of each model
    assert [event["work_done"] for event in told] == sorted(event["work_done"] for event in told)


def test_the_default_output_folder_names_model_and_ratio_and_quiet_prints_nothing(run, tiny_model, home):
    command = compress_command(tiny_model, "unused", "--ratio", "0.3", "--eval-tokens", "0", "--quiet")
    del command[2:4]
    result = run(*command)
    assert (result.exit_code, result.output) == (0, "")
    assert (home / "cospadi-tiny-0.3" / "config.json").is_file()
    assert read_report("cospadi-tiny-0.3")["evaluation"] is None


def test_flags_override_the_recipe_and_events_take_standard_output(run, tiny_model, home):
    recipe = {"ratio": 0.4, "groups": "none", "calibration": {"samples": 3}, "solver_options": {"n_iter": 2}}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--recipe", "recipe.yaml", "--solver", "orthogonal", "--ratio", "0.3"]
    options += ["--exclude", "*.down_proj", "--exclude", "*.o_proj"]
    command = compress_command(tiny_model, "out", *options, "--eval-tokens", "0", "--events", "-")
    samples = command.index("--samples")
    del command[samples : samples + 2]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["event"] == "written"  # no tables
    assert all(line.isprintable() for line in result.stderr.splitlines())
    report = read_report("out")
    assert report["config"]["ratio"] == 0.3
    assert report["config"]["groups"] == "none"
    assert report["config"]["calibration"]["samples"] == 3
    assert report["config"]["calibration"]["seq_len"] == 32
    assert report["config"]["solver_options"] == {"n_iter": 2}
    names = [member["name"] for row in report["groups"] for member in row["members"]]
    names += [layer["name"] for layer in report["kept_dense"]]
    assert len(names) == 2 * 5
    assert not [name for name in names if name.endswith(("down_proj", "o_proj"))]


def test_an_encoder_is_compressed_without_perplexity(run, tiny_model, home):
    import transformers as tf

    from cospadi.models.dense_model import read_tokenizer

    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    )
    tf.BertModel(config).save_pretrained(home / "bert")
    read_tokenizer(tiny_model).save_pretrained(home / "bert")
    result = run(*compress_command("bert", "out"))
    assert result.exit_code == 0, result.output
    assert "Not evaluated: switched off, or not a causal language model" in result.stdout
    assert "AutoModel.from_pretrained" in (home / "out" / "README.md").read_text()
    for command in (["eval", "./out"], ["generate", "./out", "--prompt", "x"]):
        failed = run(*command)
        assert failed.exit_code == 2
        assert "not a causal language model" in failed.stderr
