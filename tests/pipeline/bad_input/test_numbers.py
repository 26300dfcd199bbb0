"""Numbers that are not as they should be: not finite, all zero, too few."""

import pytest
import torch
from safetensors.torch import load_file

from cospadi.errors import NumericalError, UsageError
from tests import helpers
from tests.helpers import tiny_model
from tests.pipeline.bad_input.common import BLOCKS, STREAMED, WHOLE, nothing_begun, recipe, refused, run, save

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed folder", "object"])
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("name", [f"{BLOCKS}.1.mlp.up_proj", f"{BLOCKS}.0.input_layernorm", "lm_head"])
def test_a_weight_that_is_not_finite_is_named_before_anything_is_written(tmp_path, out, name, value, streamed):
    def change(model):
        model.get_parameter(f"{name}.weight").view(-1)[7] = value

    model = tiny_model("llama")
    folder = save(model, tmp_path / "model", torch.bfloat16, change=change)
    refused(
        NumericalError, [f"{name}.weight holds NaN or infinity"], folder if streamed else model, out, execution=STREAMED
    )
    assert nothing_begun(out)


def infinite_attention(model):
    for kind in ("q_proj", "k_proj"):
        model.get_parameter(f"{BLOCKS}.1.self_attn.{kind}.weight").normal_(0, 1e20)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
@pytest.mark.parametrize("column_weights", [False, True], ids=["Grams", "gradients"])
@pytest.mark.parametrize("execution", [STREAMED, WHOLE], ids=["streamed", "whole"])
def test_activations_that_turn_nan_in_the_middle_name_the_layer(tmp_path, out, order, column_weights, execution):
    folder = save(tiny_model("llama"), tmp_path / "model", change=infinite_attention)
    config = recipe({"order": order}, column_weights=column_weights)
    message = refused(NumericalError, [f"{BLOCKS}.1.self_attn.o_proj", "NaN"], folder, out, config, execution)
    again = refused(NumericalError, [], folder, out, config, execution, resume=True)
    assert again == message
    refused(UsageError, ["add --resume", "or delete it"], folder, out, config, execution)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "float16"])
def test_products_that_overflow_in_a_float16_model_name_the_layer(tmp_path, out, value_dtype):
    def change(model):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            model.get_parameter(f"{BLOCKS}.0.mlp.{kind}.weight").fill_(6e4)
        model.get_parameter(f"{BLOCKS}.0.post_attention_layernorm.weight").fill_(100)

    folder = save(tiny_model("llama"), tmp_path / "model", torch.float16, change=change)
    words = [f"{BLOCKS}.0.mlp.down_proj", "overflows float32"]
    refused(NumericalError, words, folder, out, recipe(value_dtype=value_dtype))


def test_the_largest_weights_of_float16_are_no_trouble(tmp_path, out):
    def change(model):
        model.get_parameter(f"{BLOCKS}.0.mlp.up_proj.weight").mul_(65504 / 0.1).clamp_(-65504, 65504)

    folder = save(tiny_model("llama"), tmp_path / "model", torch.float16, change=change)
    report = run(folder, out, recipe(value_dtype="float16"))
    assert all(torch.isfinite(t).all() for t in load_file(out / "model.safetensors").values() if t.is_floating_point())
    assert 0 < report["totals"]["mean_relative_error"] < 1


KNAPSACK = {"allocation": "knapsack", "column_weights": True, "rho": 2.0}


@pytest.mark.parametrize("more", [{}, KNAPSACK], ids=["uniform", "knapsack"])
def test_zeros_where_there_should_be_numbers_are_told_in_the_report(tmp_path, out, more):
    def change(model):
        model.get_parameter(f"{BLOCKS}.0.self_attn.o_proj.weight").zero_()
        model.get_parameter(f"{BLOCKS}.0.input_layernorm.weight")[5] = 0
        model.get_parameter(f"{BLOCKS}.1.input_layernorm.weight").zero_()

    folder = save(tiny_model("llama"), tmp_path / "model", change=change)
    report = run(folder, out, recipe(**more, include=("*self_attn*",)))
    rows = {member["name"]: row for row in report["groups"] for member in row["members"]}
    errors = {member["name"]: member["relative_error"] for row in report["groups"] for member in row["members"]}
    if f"{BLOCKS}.0.self_attn.q_proj" in rows:
        row = rows[f"{BLOCKS}.0.self_attn.q_proj"]
        assert row["note"] == "1 input features are always zero"
        assert row["damping"] > 0
    if f"{BLOCKS}.1.self_attn.q_proj" in rows:
        assert "all calibration inputs are zero" in rows[f"{BLOCKS}.1.self_attn.q_proj"]["note"]
    assert any(row["note"] for row in rows.values())
    assert errors.get(f"{BLOCKS}.0.self_attn.o_proj", 0.0) == 0
    assert all(0 <= error < 1 for error in errors.values())


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_fewer_tokens_than_features_are_damped_and_the_rows_say_so(folder, out, order):
    report = run(folder, out, recipe({"order": order}), windows=helpers.token_windows(1, 10))
    for row in report["groups"]:
        assert row["note"].startswith(f"only 10 tokens for {row['in_features']} features")
        assert 0 < row["damping"] <= 0.1


@pytest.mark.parametrize("more", [{}, {**KNAPSACK, "allocation": "equal-ratio"}], ids=["uniform", "equal-ratio"])
def test_an_expert_without_tokens_is_compressed_and_its_row_says_so(tmp_path, out, more):
    def change(model):  # a router that never chooses expert 3
        for block in model.model.layers:
            block.mlp.gate.weight[3] = 0
            block.mlp.gate.weight[:3] = 10 * block.mlp.gate.weight[:3].abs() + 1
        model.model.embed_tokens.weight.abs_()

    folder = save(tiny_model("qwen3-moe"), tmp_path / "model", change=change)
    config = recipe(include=("*layers.0.*experts*",), **more)
    report = run(folder, out, config, windows=helpers.token_windows(1, 8))
    silent = {row["name"] for row in report["groups"] if row["note"].startswith("no calibration token reached")}
    assert f"{BLOCKS}.0.mlp.experts.gate_up.3" in silent
