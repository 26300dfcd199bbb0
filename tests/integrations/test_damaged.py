"""Checkpoints that have changed since they were written: ``load``, transformers, ``decompress`` and ``inspect``."""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from click.testing import CliRunner
from cospadi_cli.commands.inspect import inspect_checkpoint
from cospadi_cli.main import main
from transformers import AutoModelForCausalLM

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats import checksums
from cospadi.formats.checkpoint import CheckpointConfig
from cospadi.formats.checksums import CHECKSUMS, write_checksums
from cospadi.integrations.compressed_model import decompress, load

from ..checkpoints import edit_config, make_checkpoint
from ..fuzz.folders import mutate_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint in shards with checksums and a report."""
    folder = make_checkpoint(tmp_path_factory.mktemp("made") / "model", "llama", "bitmask", "bfloat16").folder
    write_report(folder)
    write_checksums(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy")


def write_report(folder, change=lambda report: None):
    report = inspect_checkpoint(folder)
    for row in report["groups"]:
        for one in (row, *row["members"]):
            one["relative_error"] = 0.25
    (folder / "report.json").write_text(json.dumps(change(report) or report))


def flip(path, tensor):
    """Change a bit of the first number of a tensor."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]] ^= 1
    path.write_bytes(data)


def inspect(folder, *options):
    result = CliRunner().invoke(main, ["inspect", str(folder), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_one_changed_bit_of_a_weight_is_refused_by_load_and_by_transformers(folder):
    flip(folder / "model.safetensors", "model.norm.weight")
    for opened in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: differs from its checksum in SHA256SUMS"):
            opened(folder)
    load(folder, checksums=False)
    (folder / CHECKSUMS).unlink()
    load(folder)
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_changed_configuration_is_refused_before_it_is_used(folder):
    edit_config(folder, lambda data: data.update(rms_norm_eps=0.5))
    with pytest.raises(CheckpointError, match=r"config\.json: differs"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: differs"):
        AutoModelForCausalLM.from_pretrained(folder)
    result = inspect(folder)
    assert result.exit_code == 1
    assert "config.json: differs from its checksum" in result.stderr


def test_every_file_is_read_once(folder, monkeypatch):
    read = []
    original = checksums.checksum
    monkeypatch.setattr(checksums, "checksum", lambda path: read.append(path.name) or original(path))
    load(folder)
    assert sorted(read) == ["config.json", "model.safetensors"]
    load(folder, checksums=False)
    assert len(read) == 2
    AutoModelForCausalLM.from_pretrained(folder)
    assert len(read) == 4


def test_what_is_saved_elsewhere_has_no_checksums_of_the_old_files(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / CHECKSUMS).exists()
    assert torch.equal(load(tmp_path / "saved").lm_head.weight, model.lm_head.weight)
    decompress(folder, tmp_path / "dense")
    assert not (tmp_path / "dense" / CHECKSUMS).exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "many"),
        ("hidden_size", 33),
        ("num_attention_heads", 0),
        ("num_attention_heads", 2**40),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("vocab_size", 10**12),
        ("hidden_act", "nosuch"),
        ("rope_parameters", [1]),
        ("dtype", "float99"),
        ("model_type", "nosuch"),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", []),
    ],
)
def test_a_configuration_that_transformers_cannot_use_is_refused_in_one_line(folder, key, value):
    (folder / CHECKSUMS).unlink()
    edit_config(folder, lambda data: data.update({key: value}))
    with pytest.raises((CheckpointError, UsageError)) as caught:
        load(folder)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


def test_experts_without_tensors_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "moe", "mixtral", "bitmask", "int8").folder
    load(folder)
    edit_config(folder, lambda data: data.update(num_local_experts=10**9))
    with pytest.raises(CheckpointError, match="num_local_experts is 1000000000"):
        load(folder)


def test_mutated_folders_are_refused_or_load_the_same_model(made, tmp_path):
    expected, outcomes = load(made), Counter()
    for number in range(120):
        rng = random.Random(number)
        folder, names = mutate_folder(made, tmp_path / "mutated", rng, [made])
        assert inspect(folder).exit_code in (0, 1, 2)
        try:
            found = load(folder)
        except (CheckpointError, UsageError):
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
            tensors = found.state_dict()
            assert all(torch.equal(tensors[name], t) for name, t in expected.state_dict().items()), (number, names)
            assert found.config.to_dict() | {"_name_or_path": ""} == expected.config.to_dict() | {"_name_or_path": ""}
        shutil.rmtree(folder)
    assert outcomes["refused"] > 10 < outcomes["loaded"]


# --- inspect


def row(**values):
    return lambda report: report["groups"][0].update(values)


REPORTS = {
    "no groups": lambda report: report.update(groups=[]),
    "groups that are no list": lambda report: report.update(groups={"a": 1}),
    "a group that is no mapping": lambda report: report["groups"].__setitem__(0, 3),
    "no totals": lambda report: report.pop("totals") and None,
    "totals of nothing": lambda report: report["totals"].update(layer_dense_bytes=0),
    "totals beyond numbers": lambda report: report["totals"].update(layer_bytes=10**400),
    "totals that are true": lambda report: report["totals"].update(n_layers=True),
    "totals that are text": lambda report: report["totals"].update(n_layers="7"),
    "no evaluation": lambda report: report.pop("evaluation") and None,
    "evaluation of NaN": lambda report: report.update(evaluation=float("nan")),
    "bytes of another checkpoint": row(bytes=1),
    "dense bytes of zero": row(dense_bytes=0),
    "an error that is text": row(relative_error="0.1"),
    "an error of infinity": row(relative_error=float("inf")),
    "an error below zero": row(relative_error=-0.1),
    "an error of nothing": row(relative_error=None),
    "another name": row(name="\x1b[2J"),
    "another kind": row(kind="magic"),
    "a side that is a list": row(side=[]),
    "members that are no list": row(members=3),
    "no members": row(members=[]),
    "a member that is no mapping": row(members=[1]),
    "atoms that are text": row(n_atoms="many"),
    "non-zeros below zero": row(n_nonzero=-1),
    "a missing key": lambda report: report["groups"][0].pop("kind") and None,
    "no mapping": lambda report: [report],
}


@pytest.mark.parametrize("what", REPORTS)
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_inspect_refuses_a_damaged_report_in_one_line(folder, what, options):
    assert inspect(folder, *options).exit_code == 0
    (folder / "report.json").unlink()
    write_report(folder, REPORTS[what])
    result = inspect(folder, *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert "report.json" in result.stderr


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[" * 10**5, b'{"groups": ' + b"[" * 400 + b"]" * 400 + b"}", b'{"a": 1, "a": 2}', b"1"]
)
def test_inspect_refuses_a_report_that_is_no_object(folder, content):
    (folder / "report.json").write_bytes(content)
    for options in ((), ("--json",)):
        result = inspect(folder, *options)
        assert result.exit_code == 1
        assert result.stderr.startswith("Error: ")


def test_inspect_of_a_checkpoint_without_compressed_layers(tmp_path):
    empty = CheckpointConfig(()).to_dict()
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": empty}))
    assert "no layer is compressed" in inspect(tmp_path).stdout
    assert json.loads(inspect(tmp_path, "--json").stdout)["groups"] == []
