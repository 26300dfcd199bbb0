"""Whole runs on tiny random models of every architecture."""

import hashlib
import json

import pytest
import torch
from torch import nn

import cospadi
from cospadi.errors import NumericalError, UsageError
from cospadi.events import Calibrated, GroupFinished
from cospadi.models.experts import split_experts
from cospadi.models.layers import weight_matrix
from cospadi.pipeline.stages import compress
from cospadi.recipe.options import CalibrationConfig, CompressionConfig
from tests.helpers import ARCHITECTURES, outputs, tiny_model, token_windows


def recipe(**more):
    """The plain way: the same ratio for every group by formula, nothing measured but the Grams."""
    more = {"solver": "htp", "solver_options": {"n_iter": 3}, "ratio": 0.3} | more
    more = {"allocation": "uniform", "column_weights": False} | more
    return CompressionConfig(calibration=CalibrationConfig(batch_size=2), **more)


def digests(folder):
    """Every file but run.json, which holds the times."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name != "run.json"}


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        *((architecture, "natural") for architecture in ARCHITECTURES),
        *(
            (architecture, groups)
            for architecture in ("llama", "gpt2", "mixtral")
            for groups in ("none", "consecutive:2")
        ),
    ],
)
def test_every_architecture_compresses_reloads_and_matches(architecture, groups, tmp_path):
    model, windows = tiny_model(architecture), token_windows()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = compress(model, tmp_path / "out", recipe(groups=groups), windows=windows)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    loaded = cospadi.load(tmp_path / "out", backend="reference", dtype=torch.float32)
    dense = tiny_model(architecture)
    split_experts(dense)
    compressed = {name: module for name, module in loaded.named_modules() if hasattr(module, "to_dense")}
    members = {m["name"]: m for row in report["groups"] for m in row["members"]}
    assert set(compressed) == set(members)
    # A dense model with the products in place of its weights computes what the compressed one does ...
    modules = dict(dense.named_modules())
    for name, module in compressed.items():
        with torch.no_grad():
            weight_matrix(modules[name]).copy_(module.to_dense().T)
    torch.testing.assert_close(outputs(loaded, windows), outputs(dense, windows), rtol=2e-2, atol=2e-3)
    # ... and every other tensor is what it was.
    kept = {k: v for k, v in loaded.state_dict().items() if k.rpartition(".")[0] not in compressed}
    assert kept
    assert all(torch.equal(v, dense.state_dict()[k].to(v.dtype)) for k, v in kept.items())


@pytest.mark.parametrize("groups", ["none", "natural"])
def test_the_reported_error_is_the_error_of_the_layers_outputs(groups, tmp_path):
    model, windows = tiny_model("llama"), token_windows(8)
    report = compress(model, tmp_path / "out", recipe(groups=groups), windows=windows)
    loaded = cospadi.load(tmp_path / "out", backend="reference", dtype=torch.float32)
    modules, small = dict(model.named_modules()), dict(loaded.named_modules())
    inputs = {}
    handles = [
        m.register_forward_pre_hook(
            lambda _, args, name=n: inputs.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]))
        )
        for n, m in modules.items()
        if isinstance(m, nn.Linear)
    ]
    outputs(model, windows)
    for handle in handles:
        handle.remove()
    for row in report["groups"]:
        for member in row["members"]:
            x = inputs[member["name"]].double()
            exact = x @ weight_matrix(modules[member["name"]]).double()
            error = x @ small[member["name"]].to_dense().T.double() - exact
            assert member["relative_error"] == pytest.approx(float(error.norm() / exact.norm()), rel=1e-4)


def test_honest_bytes_are_those_on_disk(tmp_path):
    from safetensors import safe_open

    report = compress(tiny_model("llama"), tmp_path / "out", recipe(ratio=0.25), windows=token_windows())
    sizes = {}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            sizes[key] = file.get_tensor(key).nbytes
    members = [m["name"] for row in report["groups"] for m in row["members"]]
    stored = sum(size for key, size in sizes.items() if key.rpartition(".")[0] in members)
    totals = report["totals"]
    assert stored == totals["layer_bytes"]
    assert sum(sizes.values()) == totals["model_bytes"]
    assert totals["ratio"] == 1 - stored / totals["layer_dense_bytes"]
    assert totals["ratio"] >= 0.25


@pytest.mark.parametrize("solver", ["svd", "orthogonal", "single-step", "ksvd-torch", "ksvd-numpy", "mod"])
def test_solvers_swap_in_one_word(solver, tmp_path):
    config = recipe(solver=solver, solver_options={}, ratio=0.4)
    report = compress(tiny_model("llama"), tmp_path / "out", config, windows=token_windows())
    assert report["solver"]["name"] == solver
    assert 0 < report["totals"]["mean_relative_error"] < 1
    cospadi.load(tmp_path / "out")


KNAPSACK = {"allocation": "knapsack", "column_weights": True}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, KNAPSACK], ids=["uniform", "knapsack"])
def test_the_same_run_gives_the_same_bytes_and_measurements_can_be_reused(options, tmp_path):
    model, windows, config = tiny_model("llama"), token_windows(), recipe(**options)
    compress(model, tmp_path / "a", config, windows=windows)
    compress(model, tmp_path / "b", config, windows=windows, cache=tmp_path / "cache")
    events = []
    compress(model, tmp_path / "c", config, windows=windows, cache=tmp_path / "cache", on_event=events.append)
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")
    assert not any(isinstance(event, Calibrated) for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("stop_after", [1, 3, 8])
@pytest.mark.parametrize("groups", ["natural", "consecutive:2"])
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(stop_after, groups, tmp_path):
    model, windows, config = tiny_model("llama"), token_windows(), recipe(groups=groups)

    class Stop(Exception):
        pass

    def stop(event):
        if isinstance(event, GroupFinished) and event.done == min(stop_after, event.total):
            raise Stop

    with pytest.raises(Stop):
        compress(model, tmp_path / "stopped", config, windows=windows, on_event=stop)
    with pytest.raises(UsageError, match="add --resume"):
        compress(model, tmp_path / "stopped", config, windows=windows)
    with pytest.raises(UsageError, match="another recipe"):
        compress(model, tmp_path / "stopped", recipe(ratio=0.5), windows=windows, resume=True)
    events = []
    compress(model, tmp_path / "stopped", config, windows=windows, resume=True, on_event=events.append)
    report = compress(model, tmp_path / "whole", config, windows=windows, resume=True)
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    resumed = sum(e.resumed for e in events if isinstance(e, GroupFinished))
    assert resumed == min(stop_after, len(report["groups"]))
    assert not (tmp_path / "stopped" / ".cospadi-work").exists()


def test_numerical_trouble_stops_with_the_layers_name(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(NumericalError, match=r"layers\.1\."):
        compress(model, tmp_path / "out", recipe(), windows=token_windows())
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[2] = float("inf")
    with pytest.raises(NumericalError, match=r"layers\.0\."):
        compress(model, tmp_path / "out2", recipe(), windows=token_windows())


def test_repairs_are_in_the_report(tmp_path):
    report = compress(tiny_model("llama"), tmp_path / "out", recipe(), windows=token_windows(1, 10))
    assert all("tokens for" in row["note"] and row["damping"] > 0 for row in report["groups"])
    json.dumps(report)


def test_an_expert_without_tokens_is_compressed_by_its_weights_and_named(tmp_path):
    model, windows = tiny_model("qwen3-moe"), token_windows(1, 8)
    with torch.no_grad():  # a router that never chooses expert 3
        for block in model.model.layers:
            block.mlp.gate.weight[3] = 0
            block.mlp.gate.weight[:3] = 10 * block.mlp.gate.weight[:3].abs() + 1
        model.model.embed_tokens.weight.abs_()
    report = compress(model, tmp_path / "out", recipe(include=("*experts*",)), windows=windows)
    silent = [row for row in report["groups"] if "no calibration token reached" in row["note"]]
    assert {row["name"].rpartition(".")[2] for row in silent} >= {"3"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"solver": "hpt", "solver_options": {}}, "did you mean 'htp'"),
        ({"solver_options": {"n_iters": 3}}, "no option 'n_iters'; did you mean 'n_iter'"),
        ({"solver_options": {"n_iter": "many"}}, "n_iter='many'"),
        ({"solver": "ksvd-cupy", "solver_options": {}}, "cannot run here"),
        ({"solver": "svd", "solver_options": {}, "format": "bitmask"}, "does not fit"),
        ({"format": "cbr"}, "unknown format 'cbr'; did you mean 'csr'"),
        ({"include": ("*nope*",)}, "matches nothing"),
        ({"device": "gpu"}, "unknown device"),
        ({"ratio": 0.999}, "no layer is large enough"),
    ],
)
def test_misuse_is_one_clear_line_before_anything_is_written(change, text, tmp_path):
    if change.get("solver") == "ksvd-cupy" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError) as caught:
        compress(tiny_model("llama"), tmp_path / "out", recipe(**change), windows=token_windows())
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_windows_must_fit_the_model(tmp_path):
    with pytest.raises(UsageError, match="wrong tokenizer"):
        compress(tiny_model("llama"), tmp_path / "out", recipe(), windows=token_windows() + 90)
    with pytest.raises(UsageError, match="positions"):
        compress(tiny_model("llama"), tmp_path / "out", recipe(), windows=token_windows(1, 65))
    with pytest.raises(UsageError, match="needs a tokenizer"):
        compress(tiny_model("llama"), tmp_path / "out", recipe())
