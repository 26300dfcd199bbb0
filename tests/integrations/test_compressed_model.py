"""Checkpoints through transformers, ``load`` and ``decompress``."""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from cospadi.backends.sparse_linear import SparseLinear, sparse_modules
from cospadi.errors import CheckpointError, UnavailableError, UsageError
from cospadi.formats.checkpoint import INDEX, CheckpointConfig, ShardWriter
from cospadi.formats.verify import read_config, read_tensors, verify_checkpoint
from cospadi.integrations.compressed_model import decompress, load

from ..checkpoints import edit_config, make_checkpoint
from ..helpers import outputs, tiny_model, token_windows

WINDOWS = token_windows(2, 12)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama") / "model")


def close(found, expected, tolerance=2e-5):
    return float((found - expected).norm() / expected.norm()) < tolerance


def same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


ARCHITECTURES = [
    *("llama", "llama-tied", "gpt2", "mixtral", "qwen3-moe"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("mistral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "bert")
    ),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_checkpoint_computes_what_its_dense_model_does_and_survives_saving(architecture, tmp_path):
    made = make_checkpoint(tmp_path / "first", architecture, max_shard_bytes=20_000)
    expected = outputs(made.dense, WINDOWS)
    model = load(made.folder)
    assert close(outputs(model, WINDOWS), expected)
    assert len(sparse_modules(model)) == sum(len(group.members) for group in made.config.groups)
    assert not model.training

    model.save_pretrained(tmp_path / "second")
    assert read_config(tmp_path / "second") == made.config
    same_tensors(read_tensors(made.folder), read_tensors(tmp_path / "second"))
    # Equal tensors, yet float32 products may differ in the last bit: BLAS sums by the alignment of the file's pages.
    assert close(outputs(load(tmp_path / "second"), WINDOWS), outputs(model, WINDOWS), 1e-6)

    dense = decompress(made.folder, tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
    plain = type(made.dense).from_pretrained(dense)
    assert close(outputs(plain, WINDOWS), expected)
    assert {n: p.shape for n, p in plain.named_parameters()} == {n: p.shape for n, p in made.dense.named_parameters()}


# Layers that add to the residual stream: alone in their groups, with a bias in two of the models.
OUTPUT_SIDED = {"llama": ("down_proj", "o_proj"), "gpt2": ("c_proj",), "opt": ("fc2", "out_proj")}


@pytest.mark.parametrize("architecture", OUTPUT_SIDED)
@pytest.mark.parametrize(("format", "value_dtype"), [("bitmask", "float32"), ("csr", "int8"), ("dense", "bfloat14")])
def test_a_model_with_dictionaries_on_the_side_of_the_outputs(architecture, format, value_dtype, tmp_path):
    names = OUTPUT_SIDED[architecture]
    made = make_checkpoint(tmp_path / "first", architecture, format, value_dtype, output_sided=names)
    turned = [group for group in made.config.groups if group.side == "output"]
    assert len(turned) == 4  # two in each of two blocks
    assert len(turned) < len(made.config.groups)
    assert verify_checkpoint(made.folder) == made.config

    expected = outputs(made.dense, WINDOWS)
    model = load(made.folder)
    assert close(outputs(model, WINDOWS), expected, 2e-5)
    for backend in ("reference", "torch"):
        assert close(outputs(load(made.folder, backend=backend), WINDOWS), expected)

    model.save_pretrained(tmp_path / "second")
    assert read_config(tmp_path / "second") == made.config
    same_tensors(read_tensors(made.folder), read_tensors(tmp_path / "second"))
    assert close(outputs(load(tmp_path / "second"), WINDOWS), outputs(model, WINDOWS), 1e-6)

    dense = decompress(made.folder, tmp_path / "dense")
    assert close(outputs(type(made.dense).from_pretrained(dense), WINDOWS), expected)


@pytest.mark.parametrize(
    ("format", "value_dtype"), [("bitmask", "bfloat14"), ("csr", "bfloat16"), ("dense", "float16")]
)
def test_packed_tensors_keep_their_dtype_whatever_dtype_is_asked_for(format, value_dtype, tmp_path):
    made = make_checkpoint(tmp_path / "model", format=format, value_dtype=value_dtype, dtype=torch.bfloat16)
    stored = read_tensors(made.folder)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = load(made.folder, dtype=dtype)
        state = model.state_dict()
        for group in made.config.groups:
            for member in group.members:
                layer = model.get_submodule(member.name)
                for local in layer.state_dict():
                    assert state[f"{member.name}.{local}"].dtype == stored[f"{member.name}.{local}"].dtype
                    assert torch.equal(state[f"{member.name}.{local}"], stored[f"{member.name}.{local}"])
        assert outputs(model, WINDOWS).dtype == dtype
        assert close(outputs(model, WINDOWS).float(), outputs(made.dense, WINDOWS).float(), 3e-2)


@pytest.mark.parametrize(
    "imports",
    [
        "import cospadi, sys; assert 'transformers' not in sys.modules; import transformers",
        pytest.param("import transformers; transformers.LlamaForCausalLM; import cospadi", marks=pytest.mark.slow),
    ],
    ids=["cospadi first", "transformers first"],
)
def test_a_plain_import_is_enough_for_transformers(llama, tmp_path, imports):
    torch.save(WINDOWS, tmp_path / "windows.pt")
    code = (
        f"{imports}\nimport torch\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(llama.folder)!r})\n"
        f"logits = model(torch.load({str(tmp_path / 'windows.pt')!r})).logits\n"
        f"torch.save(logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    assert close(torch.load(tmp_path / "logits.pt"), outputs(llama.dense, WINDOWS))


def test_the_base_model_alone_opens_and_saves(llama, tmp_path):
    base = AutoModel.from_pretrained(llama.folder)
    assert close(outputs(base, WINDOWS), outputs(llama.dense.model, WINDOWS))
    base.save_pretrained(tmp_path / "base")
    verify_checkpoint(tmp_path / "base")
    assert close(outputs(load(tmp_path / "base"), WINDOWS), outputs(base, WINDOWS), 1e-6)


def test_no_table_of_conversions_renames_our_tensors(llama):
    """The mapping stands for an entry of transformers' tables that happens to match."""
    model = AutoModelForCausalLM.from_pretrained(llama.folder, key_mapping={r"layers\.0\.": "layers.1."})
    assert close(outputs(model, WINDOWS), outputs(llama.dense, WINDOWS))


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    made = make_checkpoint(tmp_path / "model", "llama-tied")
    assert "lm_head.weight" not in read_tensors(made.folder)
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in read_tensors(tmp_path / "again")


def test_nothing_compressed_asks_for_gradients(llama):
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    for layer in sparse_modules(model).values():
        assert not any(parameter.requires_grad for parameter in layer.parameters())
        assert not hasattr(layer, "weight")
    assert model.model.embed_tokens.weight.requires_grad


def test_dequantize_of_transformers_gives_dense_layers(llama):
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    model.dequantize()
    assert not any(isinstance(module, SparseLinear) for module in model.modules())
    assert getattr(model.config, "quantization_config", None) is None
    assert close(outputs(model, WINDOWS), outputs(llama.dense, WINDOWS))


def test_experts_get_the_names_of_the_original_checkpoint_when_decompressed(tmp_path):
    made = make_checkpoint(tmp_path / "model", "mixtral")
    tiny_model("mixtral").save_pretrained(tmp_path / "original")
    decompress(made.folder, tmp_path / "dense")
    assert set(read_tensors(tmp_path / "dense")) == set(read_tensors(tmp_path / "original"))


def test_the_backend_is_chosen_for_the_run_and_not_saved(llama, tmp_path):
    model = load(llama.folder, backend="reference")
    assert {layer.backend for layer in sparse_modules(model).values()} == {"reference"}
    model.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again").backend == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks the refusal on machines without a GPU")
def test_a_backend_that_cannot_run_here_is_refused_with_the_reason(tmp_path):
    made = make_checkpoint(tmp_path / "model")
    with pytest.raises(UnavailableError, match="no CUDA GPU"):
        load(made.folder, backend="cuda")
    edit_config(made.folder, lambda data: data["quantization_config"].update(backend="cuda"))
    with pytest.raises(UnavailableError, match="recommends, cannot run here"):
        load(made.folder)
    with pytest.raises(UnavailableError, match=r"cospadi\.load"):
        AutoModelForCausalLM.from_pretrained(made.folder)
    assert close(outputs(load(made.folder, backend="auto"), WINDOWS), outputs(made.dense, WINDOWS))


def test_an_unknown_backend_is_a_usage_error(llama):
    with pytest.raises(UsageError, match="unknown backend 'torhc'; did you mean 'torch'"):
        load(llama.folder, backend="torhc")


def test_what_is_no_checkpoint_is_named(tmp_path):
    def folder(name, config=None):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    adapter = folder("adapter")
    (adapter / "adapter_config.json").write_text("{}")
    for path, text in (
        (tmp_path / "nosuch", "no such folder"),
        (tmp_path / "model.gguf", "a GGUF file"),
        (folder("empty"), "no config.json"),
        (adapter, "an adapter"),
        (folder("dense", {"model_type": "llama"}), "a dense model"),
        (folder("gptq", {"quantization_config": {"quant_method": "gptq"}}), "quantised with 'gptq'"),
    ):
        with pytest.raises(UsageError, match=text):
            load(path)


def test_an_architecture_from_elsewhere_is_refused(tmp_path):
    made = make_checkpoint(tmp_path / "model")
    (made.folder / "evil.py").write_text("raise SystemExit('code of the folder was run')")
    for name in ("EvilForCausalLM", "AutoModel", "logging"):
        edit_config(
            made.folder,
            lambda data, name=name: data.update(architectures=[name], auto_map={"AutoModelForCausalLM": "evil.E"}),
        )
        with pytest.raises(UsageError, match="never run"):
            load(made.folder)
    edit_config(made.folder, lambda data: data.update(architectures=["LlamaForCausalLM"]))
    assert type(load(made.folder)).__module__.startswith("transformers.")


def test_decompress_copies_the_tokenizer_and_leaves_code_and_reports(tmp_path):
    made = make_checkpoint(tmp_path / "model")
    for name in ("tokenizer.json", "chat_template.jinja", "report.json", "README.md", "evil.py", "pytorch_model.bin"):
        (made.folder / name).write_text(name)
    outside = tmp_path / "secret.json"
    outside.write_text("secret")
    (made.folder / "vocab.json").symlink_to(outside)
    out = decompress(made.folder, tmp_path / "new" / "dense")
    copied = {file.name for file in out.iterdir()}
    assert copied == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["dense"]


def test_decompress_refuses_an_output_in_use_and_takes_an_empty_one(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep.txt").write_text("mine")
    for path in (out, out / "keep.txt"):
        with pytest.raises(UsageError, match="choose a new folder"):
            decompress(llama.folder, path)
    assert (out / "keep.txt").read_text() == "mine"
    (out / "keep.txt").unlink()
    decompress(llama.folder, out, dtype=torch.float16)
    assert read_tensors(out)["model.layers.0.mlp.up_proj.weight"].dtype == torch.float16


def test_a_writer_cuts_between_modules_and_gives_the_same_bytes(tmp_path):
    modules = {f"layer.{i}": {f"layer.{i}.{k}": torch.full((10,), float(i)) for k in ("a", "b")} for i in range(5)}
    for name in ("one", "two"):
        with ShardWriter(tmp_path / name, max_shard_bytes=200) as writer:
            for module, tensors in modules.items():
                writer.add(module, tensors)
    index = json.loads((tmp_path / "one" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 5 * 2 * 40
    assert len(set(index["weight_map"].values())) == 3
    for module, tensors in modules.items():
        assert len({index["weight_map"][key] for key in tensors}) == 1, module
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    same_tensors(read_tensors(tmp_path / "one"), {k: t for tensors in modules.values() for k, t in tensors.items()})


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def write():
        with ShardWriter(tmp_path / "model", max_shard_bytes=10) as writer:
            writer.add("a", {"a.x": torch.ones(4)})
            writer.add("b", {"b.x": torch.ones(4)})
            assert not any(file.name.endswith(".safetensors") for file in (tmp_path / "model").iterdir())
            writer.add("a", {"a.x": torch.ones(4)})

    with pytest.raises(ValueError, match="added before"):
        write()
    assert list((tmp_path / "model").iterdir()) == []


def test_a_writer_stores_views_whole_and_refuses_a_folder_in_use(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    with ShardWriter(tmp_path) as writer:
        writer.add("a", {"a.t": base.T, "a.row": base[1], "a.same": base[1]})
    assert torch.equal(read_tensors(tmp_path)["a.t"], base.T)
    with pytest.raises(UsageError, match="already holds a checkpoint"):
        ShardWriter(tmp_path)


def test_a_description_survives_json(llama):
    assert CheckpointConfig.from_dict(json.loads(json.dumps(llama.config.to_dict()))) == llama.config


@pytest.mark.parametrize("lacking", ["model.layers.0.mlp.up_proj.mask", "model.norm.weight"])
def test_missing_tensors_are_an_error_not_random_numbers(tmp_path, lacking):
    made = make_checkpoint(tmp_path / "model")
    tensors = read_tensors(made.folder)
    (made.folder / "model.safetensors").unlink()
    with ShardWriter(made.folder) as writer:
        writer.add("all", {key: tensor for key, tensor in tensors.items() if key != lacking})
    with pytest.raises(CheckpointError, match=lacking):
        load(made.folder)
    if lacking.endswith("mask"):
        with pytest.raises(CheckpointError, match=lacking):
            AutoModelForCausalLM.from_pretrained(made.folder)
