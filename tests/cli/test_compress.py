import json
from contextlib import contextmanager

import pytest
import torch
import yaml
from cospadi_cli import compress

from cospadi.calibration.data import read_text
from cospadi.events import GroupFinished
from tests.cli.conftest import compress_command


def without_files(report):
    return {key: value for key, value in report.items() if key != "evaluation"}


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


def test_json_is_pure_and_equals_the_file(run, tiny_model, compressed):
    result = run(*compress_command(tiny_model, "out", "--json"))
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    with open("out/report.json") as file:
        assert json.load(file) == report
    assert report == json.loads((compressed / "report.json").read_text())  # the same run gives the same report
    assert "[1/" in result.stderr  # progress, as plain lines


def test_tables_show_sizes_perplexities_and_how_to_load(run, tiny_model):
    result = run(*compress_command(tiny_model, "out"))
    assert result.exit_code == 0, result.output
    for words in (
        "compressed layers",
        "whole model",
        "paper's count",
        "token perplexity",
        "Worst layers",
        "cospadi.load",
    ):
        assert words in result.stdout


def test_quiet_prints_nothing_and_no_evaluation_is_said(run, tiny_model):
    assert run(*compress_command(tiny_model, "out", "--quiet")).output == ""
    result = run(*compress_command(tiny_model, "other", "--eval-tokens", "0"))
    assert "Not evaluated" in result.stdout
    with open("other/report.json") as file:
        assert json.load(file)["evaluation"] is None


def test_the_default_output_folder_names_model_and_ratio(run, tiny_model, home):
    command = compress_command(tiny_model, "unused", "--ratio", "0.3", "--eval-tokens", "0", "--quiet")
    del command[2:4]
    assert run(*command).exit_code == 0
    assert (home / "cospadi-tiny-0.3" / "config.json").is_file()


def test_flags_override_the_recipe_and_the_recipe_the_defaults(run, tiny_model, home):
    recipe = {"ratio": 0.4, "groups": "none", "calibration": {"samples": 3}, "solver_options": {"n_iter": 2}}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    options = [
        "--recipe",
        "recipe.yaml",
        "--solver",
        "orthogonal",
        "--ratio",
        "0.3",
        "--exclude",
        "*.down_proj",
        "--exclude",
        "*.o_proj",
    ]
    command = compress_command(tiny_model, "out", *options, "--eval-tokens", "0", "--json")
    samples = command.index("--samples")
    del command[samples : samples + 2]
    report = json.loads(run(*command).stdout)
    assert report["config"]["ratio"] == 0.3
    assert report["config"]["groups"] == "none"
    assert report["config"]["calibration"]["samples"] == 3
    assert report["config"]["calibration"]["seq_len"] == 32
    assert report["config"]["solver_options"] == {"n_iter": 2}
    names = [member["name"] for row in report["groups"] for member in row["members"]]
    names += [layer["name"] for layer in report["kept_dense"]]
    assert len(names) == 2 * 5
    assert not [name for name in names if name.endswith(("down_proj", "o_proj"))]


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(run, tiny_model, compressed, monkeypatch):
    @contextmanager
    def interrupt_after_two(*arguments):
        def listener(event):
            if isinstance(event, GroupFinished) and event.done == 2:
                raise KeyboardInterrupt

        yield listener

    command = compress_command(tiny_model, "out")
    with monkeypatch.context() as patch:
        patch.setattr(compress, "progress", interrupt_after_two)
        result = run(*command)
    assert result.exit_code == 130
    assert f"cospadi-cli {' '.join(command)} --resume" in result.stderr
    refused = run(*command)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stderr.count("taken over") == 2
    with open("out/report.json") as file:
        assert json.load(file) == json.loads((compressed / "report.json").read_text())


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
    assert "not a causal language model" in result.stdout
    assert "AutoModel.from_pretrained" in (home / "out" / "README.md").read_text()
    for command in (["eval", "./out"], ["generate", "./out", "--prompt", "x"]):
        failed = run(*command)
        assert failed.exit_code == 2
        assert "not a causal language model" in failed.stderr
