"""A config that asks for code, or for what cannot be."""

import json
import tracemalloc

import pytest
import torch

from cospadi.errors import CheckpointError, UsageError
from cospadi.formats.headers import read_headers
from cospadi.models.config_check import refuse_absurd_sizes
from cospadi.models.dense_model import read_config
from cospadi.pipeline.stages import compress
from tests.helpers import tiny_model
from tests.pipeline.bad_input.common import BLOCKS, WHOLE, edit, nothing_begun, recipe, refused, run


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


def test_layers_that_the_config_does_not_count_are_told(folder, out, caplog):
    edit(folder, "config.json", lambda data: data | {"num_hidden_layers": 1})
    report = run(folder, out)
    message = next(record.getMessage() for record in caplog.records if record.name == "cospadi.pipeline.setup")
    assert "9 stored tensors have no place" in message
    assert f"{BLOCKS}.1." in message
    assert {name.split(".")[2] for name in report["left_out"]} == {"1"}


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
