"""Whole runs whose layers are stored in different ways, on tiny random models."""

import json
import math
from statistics import median

import pytest
import torch

import cospadi
from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.errors import UsageError
from cospadi.events import Calibrated, GroupFinished, Planned, Profiled
from cospadi.formats.verify import verify_checkpoint
from cospadi.models.experts import split_experts
from cospadi.models.layers import weight_matrix
from cospadi.pipeline.stages import compress
from cospadi.recipe.options import CalibrationConfig, CompressionConfig
from tests.helpers import outputs, tiny_model, token_windows
from tests.pipeline.test_compress import digests


def recipe(calibration=None, **more):
    """The default way with few iterations; only the feed-forward layers and o_proj, in groups of one and two."""
    plain = {
        "solver": "htp",
        "solver_options": {"n_iter": 2},
        "ratio": 0.4,
        "weight_dtypes": ("int8", "int4g32"),
        "include": ("*mlp*", "*o_proj*"),
    }
    given = CalibrationConfig(**({"batch_size": 2} | (calibration or {})))
    return CompressionConfig(calibration=given, **(plain | more))


FACTORS = {"storage": "factors", "value_dtype": "bfloat16", "rho": 2.0}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Calibration and profiles of the tiny llama, for all tests of this module."""
    return tmp_path_factory.mktemp("cache")


def check(report, folder, architecture="llama", rtol=2e-2):
    """Load the checkpoint and compare with a dense model that has the products for weights."""
    verify_checkpoint(folder)
    windows = token_windows()
    loaded = cospadi.load(folder, backend="reference", dtype=torch.float32)
    dense = tiny_model(architecture)
    split_experts(dense)
    compressed = {name: module for name, module in loaded.named_modules() if hasattr(module, "to_dense")}
    rows = report["groups"]
    assert set(compressed) == {member["name"] for row in rows for member in row["members"]}
    kept = {layer["name"] for layer in report["kept_dense"]}
    assert not kept & set(compressed)
    modules = dict(dense.named_modules())
    for name, module in compressed.items():
        with torch.no_grad():
            weight_matrix(modules[name]).copy_(module.to_dense().T)
    torch.testing.assert_close(outputs(loaded, windows), outputs(dense, windows), rtol=rtol, atol=2e-3)
    for row in rows:
        assert row["kind"] in ("factors", "sparse", "quantized")
        assert math.isfinite(row["loss_increase"])
        assert row["loss_increase"] >= 0
        assert (row["side"] is None) == (row["kind"] == "quantized")
        assert (row["dictionary_dtype"] == "none") == (row["kind"] == "sparse")
        assert (row["predicted_loss_increase"] is None) == (
            row["kind"] == "quantized" or "cost" not in report["allocation"]
        )
        assert row["solver"] == {"factors": "htp", "sparse": "sparse-weight", "quantized": "gptq"}[row["kind"]]
        assert row["bytes"] < row["dense_bytes"]
    config = report["config"]
    if config["convention"] == "honest":
        totals = report["totals"]
        assert totals["ratio"] >= config["ratio"] - 0.5 / (8 * totals["layer_dense_bytes"])
    json.dumps(report, allow_nan=False)


def run(out, config, cache=None, **more):
    return compress(tiny_model("llama"), out, config, windows=token_windows(), cache=cache, **more)


def test_the_default_meets_its_ratio_and_says_how(tmp_path, cache):
    events = []
    report = run(tmp_path / "out", recipe(), cache, on_event=events.append)
    check(report, tmp_path / "out")
    account = report["allocation"]
    assert (account["strategy"], account["cost"]) == ("knapsack", "sensitivity")
    assert 0 <= account["unused"] < 0.01
    assert 0 <= account["gap"] < 1e-3
    totals = report["totals"]
    assert totals["ratio"] - 0.4 == pytest.approx(0.6 * account["unused"], abs=1e-5)
    assert account["predicted_cost"] >= sum(row["predicted_loss_increase"] or 0 for row in report["groups"])
    (planned,) = [event for event in events if isinstance(event, Planned)]
    assert planned.n_units == len(report["groups"])
    assert planned.n_dense == len(report["kept_dense"])
    assert planned.n_layers == 8
    assert planned.n_factors == sum(row["kind"] == "factors" for row in report["groups"])
    profiled = [event for event in events if isinstance(event, Profiled)]
    assert [event.done for event in profiled if event.done] == [1, 2, 3, 4, 5, 6]
    assert (profiled[0].done == 0) == (not profiled[-1].resumed)  # what is to be measured begins with nothing done
    assert events.index(planned) < min(i for i, e in enumerate(events) if isinstance(e, GroupFinished))
    assert CompressionConfig.from_dict(report["config"]) == recipe()


WAYS = {
    "learned": ({**FACTORS, "dictionary": "learned"}, {("factors", "input"), ("factors", "output")}),
    "identity": ({**FACTORS, "dictionary": "identity"}, {("sparse", "input")}),
    "quantized": ({"storage": "quantized"}, {("quantized", None)}),
    "output side": (
        {**FACTORS, "dictionary": "learned", "side": "output", "groups": "none", "ratio": 0.2},
        {("factors", "output")},
    ),
    "int8": ({**FACTORS, "value_dtype": "int8", "side": "input", "dictionary": "learned"}, {("factors", "input")}),
    "paper": (
        {**FACTORS, "convention": "paper", "dictionary": "learned", "side": "input", "ratio": 0.2},
        {("factors", "input")},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_storing_layers_runs_as_its_dense_product(way, tmp_path, cache):
    options, kinds = WAYS[way]
    config = recipe(**options)
    report = run(tmp_path / "out", config, cache)
    check(report, tmp_path / "out")
    assert {(row["kind"], row["side"]) for row in report["groups"]} <= kinds
    assert report["groups"]
    if way == "output side":
        loaded = cospadi.load(tmp_path / "out")
        assert any("side=output" in repr(module) for module in loaded.modules())
    if way == "paper":
        assert 0.2 <= report["totals"]["ratio_paper_convention"] < 0.35
        assert report["totals"]["ratio"] < report["totals"]["ratio_paper_convention"]
    # Predictions have the size of what came of them: both are loss.
    if way != "quantized":
        assert 0.5 < median(row["loss_increase"] / row["predicted_loss_increase"] for row in report["groups"]) < 2


@pytest.mark.parametrize("strategy", ["pooled-spectrum", "equal-ratio"])
def test_other_strategies_run_too(strategy, tmp_path, cache):
    report = run(tmp_path / "out", recipe(allocation=strategy, cost="relative-error", column_weights=False), cache)
    check(report, tmp_path / "out")
    assert report["allocation"]["strategy"] == strategy
    assert report["allocation"]["gap"] is None


def test_loss_increase_is_that_of_the_weights_as_stored(tmp_path):
    """Recomputed in float64 from the inputs and gradients that the cache holds, and the weights that load."""
    model = tiny_model("llama")
    report = run(tmp_path / "out", recipe(**FACTORS), tmp_path / "cache")
    loaded = dict(cospadi.load(tmp_path / "out", backend="reference").named_modules())
    modules = dict(model.named_modules())
    found = [SourceStatistics.load(path) for path in (tmp_path / "cache").rglob("*.safetensors")]
    layers = {name: own for own in found for name in own.layers}
    for row in report["groups"]:
        weights = [layers[m["name"]].layers[m["name"]] for m in row["members"]]
        largest = max(float((own.squares / own.n_tokens).max()) for own in weights)
        increase = 0.0
        for member, own in zip(row["members"], weights, strict=True):
            E = weight_matrix(modules[member["name"]]).double() - loaded[member["name"]].to_dense().T.double()
            f = (own.squares / own.n_tokens).clamp_min(1e-6 * largest)
            source = layers[member["name"]]
            increase += 0.5 * float(((source.gram.matrix @ E) * E * f).sum()) / source.n_tokens
        assert row["loss_increase"] == pytest.approx(increase, rel=1e-6)


def test_layers_that_stay_dense_count_within_the_budget(tmp_path, cache):
    report = run(tmp_path / "out", recipe(limits=("*down_proj=0:0",)), cache)
    check(report, tmp_path / "out")
    kept = {layer["name"] for layer in report["kept_dense"]}
    assert {f"model.layers.{i}.mlp.down_proj" for i in range(2)} <= kept
    model, windows = tiny_model("llama"), token_windows()
    loaded = dict(cospadi.load(tmp_path / "out", dtype=torch.float32).named_modules())
    for name in kept:
        expected = weight_matrix(model.get_submodule(name)).to(torch.bfloat16).float()
        torch.testing.assert_close(weight_matrix(loaded[name]), expected, rtol=2**-7, atol=0)
    with pytest.raises(UsageError, match="ask for a ratio of at most"):
        compress(model, tmp_path / "two", recipe(limits=("*=0:0.1",)), windows=windows, cache=cache)


def test_another_ratio_costs_neither_calibration_nor_profile(tmp_path):
    cache = tmp_path / "cache"
    run(tmp_path / "a", recipe(), cache)
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert len(before) >= 6 + 6 + 1
    events = []
    report = run(tmp_path / "b", recipe(ratio=0.6), cache, on_event=events.append)
    assert not any(isinstance(event, Calibrated) for event in events)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before
    assert report["totals"]["ratio"] >= 0.6 - 1e-5
    run(tmp_path / "c", recipe(ratio=0.6))
    assert digests(tmp_path / "b") == digests(tmp_path / "c")


class Stop(Exception):
    pass


def stop_after(count, kind=GroupFinished):
    def listen(event):
        if isinstance(event, kind) and event.done >= count:
            raise Stop

    return listen


@pytest.mark.parametrize(
    ("config", "when"),
    [
        (recipe(), [(1, Calibrated), (2, Profiled), (1, GroupFinished), (3, GroupFinished)]),
        (recipe({"order": "sequential"}, **FACTORS), [(1, Profiled), (1, GroupFinished), (2, GroupFinished)]),
        (
            recipe({"order": "sequential", "mixing": 0.0}, storage="quantized", allocation="equal-ratio"),
            [(3, GroupFinished)],
        ),
    ],
    ids=["knapsack", "sequential", "sequential-quantized"],
)
def test_interrupted_again_and_again_a_run_gives_the_bytes_of_a_whole_one(config, when, tmp_path):
    whole = run(tmp_path / "whole", config)
    for index, (count, kind) in enumerate(when):
        with pytest.raises(Stop):
            run(tmp_path / "stopped", config, resume=index > 0, on_event=stop_after(count, kind))
        assert not (tmp_path / "stopped" / "config.json").exists()
    events = []
    report = run(tmp_path / "stopped", config, resume=True, on_event=events.append)
    assert report == whole
    assert digests(tmp_path / "stopped") == digests(tmp_path / "whole")
    finished = [event for event in events if isinstance(event, GroupFinished)]
    assert sum(event.resumed for event in finished) == max(n for n, kind in when if kind is GroupFinished)
    assert len(finished) == len(report["groups"])
    assert not (tmp_path / "stopped" / ".cospadi-work").exists()


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_sequential_calibration_sees_what_was_stored_before(mixing, tmp_path, cache):
    report = run(tmp_path / "out", recipe({"order": "sequential", "mixing": mixing}, **FACTORS), cache)
    check(report, tmp_path / "out")
    plain = run(tmp_path / "plain", recipe(**FACTORS), cache)
    # The plan is that of one shot; the first layers that are solved see the same inputs, later ones do not.
    for key in ("name", "kind", "n_atoms", "n_nonzero", "side"):
        assert [row[key] for row in report["groups"]] == [row[key] for row in plain["groups"]]
    increases = [
        (a["loss_increase"], b["loss_increase"]) for a, b in zip(report["groups"], plain["groups"], strict=True)
    ]
    assert increases[0][0] == pytest.approx(increases[0][1], rel=1e-6)
    assert sum(abs(a - b) > 1e-6 * b for a, b in increases) >= 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"calibration": {"order": "sequential"}, "groups": "consecutive:2"}, "choose groups none or natural"),
        ({"calibration": {"order": "sequential"}, "token_weights": True}, "knows no token weights"),
        ({"side": "output", "solver": "orthogonal", "solver_options": {}}, "needs a solver with a metric"),
        ({"ratio": 0.995}, "ask for a ratio of at most"),
    ],
)
def test_misuse_is_one_clear_line(options, text, tmp_path, cache):
    with pytest.raises(UsageError) as caught:
        run(tmp_path / "out", recipe(**options), cache)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_papers_convention_counts_factors_only():
    with pytest.raises(UsageError, match="convention 'paper' counts factors only: add storage 'factors'"):
        CompressionConfig.from_dict({"convention": "paper"})
    assert CompressionConfig.from_dict({"convention": "paper", "storage": "factors"}).convention == "paper"


def test_recipes_survive_as_dicts():
    for options in ({}, FACTORS, {"limits": ("*.down_proj=0:0.3",), "weight_dtypes": ("int4g64",)}):
        config = recipe({"order": "sequential", "labels": "text"}, **options)
        assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


OTHERS = {
    "experts": ("qwen3-moe", {"include": ("*experts*",), "storage": "quantized"}),
    "experts in factors": ("qwen3-moe", {"include": ("*layers.0*experts*",), **FACTORS, "ratio": 0.2}),
    "experts in turn": (
        "qwen3-moe",
        {"include": ("*experts*",), "storage": "quantized", "calibration": {"order": "sequential"}},
    ),
    "encoder": ("bert", {"include": ("*dense",)}),
    "encoder in turn": (
        "bert",
        {"include": ("*dense",), "calibration": {"order": "sequential"}, "storage": "quantized"},
    ),
    "across blocks": ("llama", {"groups": "consecutive:2", **FACTORS}),
    "token weights": ("llama", {"token_weights": True, "storage": "quantized", "ratio": 0.3}),
    "low rank": ("llama", {"solver": "svd", "solver_options": {}, "storage": "factors", "ratio": 0.3}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_models_and_groups(case, tmp_path):
    architecture, options = OTHERS[case]
    model, windows = tiny_model(architecture), token_windows(2, 12)
    if architecture == "qwen3-moe":
        with torch.no_grad():  # a router that never chooses expert 3
            for block in model.model.layers:
                block.mlp.gate.weight[3] = 0
                block.mlp.gate.weight[:3] = 10 * block.mlp.gate.weight[:3].abs() + 1
            model.model.embed_tokens.weight.abs_()
    report = compress(model, tmp_path / "out", recipe(**options), windows=windows)
    verify_checkpoint(tmp_path / "out")
    assert report["totals"]["ratio"] >= report["config"]["ratio"] - 1e-5
    loaded = cospadi.load(tmp_path / "out", backend="reference", dtype=torch.float32)
    assert torch.isfinite(outputs(loaded, windows)).all()
    split_experts(model)
    modules = dict(model.named_modules())
    for name, module in loaded.named_modules():
        if hasattr(module, "to_dense"):
            with torch.no_grad():
                weight_matrix(modules[name]).copy_(module.to_dense().T)
    torch.testing.assert_close(outputs(loaded, windows), outputs(model, windows), rtol=2e-2, atol=5e-3)
    if architecture == "qwen3-moe":
        rows = report["groups"] + [{"name": layer["name"], "note": None} for layer in report["kept_dense"]]
        silent = [row for row in rows if row["name"].endswith(".3")]
        assert silent
        assert all(row["note"] is None or "no calibration token reached" in row["note"] for row in silent)
    if case == "experts in factors":  # those that were left out are what they were
        assert type(loaded.model.layers[1].mlp.experts) is type(tiny_model(architecture).model.layers[1].mlp.experts)
    if case == "across blocks":
        assert any(len({m["name"].split(".")[2] for m in row["members"]}) == 2 for row in report["groups"])
