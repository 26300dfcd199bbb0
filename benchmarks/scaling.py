"""What a compression of large models would take: memory, bytes moved and stored, time.

    python benchmarks/scaling.py

Sizes come from the models' configs (no weights are made), memory from ``cospadi.pipeline.memory_plan``, work from
``cospadi.pipeline.workload``,
in whose unit a solve takes as many seconds on one core of the machine where they were fitted.
"""

import argparse
from pathlib import Path

import torch
import transformers as tf
from common import save_result

from cospadi.allocation import Factors, families_of
from cospadi.models import Layer, ModelMap, OpenModel, Weights, find_blocks, form_groups, is_linear, split_experts
from cospadi.pipeline import choose_method
from cospadi.pipeline import workload as costs
from cospadi.pipeline.mapped_model import MappedModel
from cospadi.pipeline.memory_plan import plan_memory
from cospadi.recipe import CompressionConfig

SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
"""Layers of these architectures that receive what another one receives."""

MODELS = {
    "Llama-3-8B": tf.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "Llama-3-70B": tf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, vocab_size=128256,
    ),
    "mixture of experts, 400B (Qwen3's architecture)": tf.Qwen3MoeConfig(
        hidden_size=4096, moe_intermediate_size=2560, num_hidden_layers=96, num_attention_heads=64, head_dim=128,
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
    ),
}  # fmt: skip
RECIPES = {
    "uniform, learned dictionaries by htp": {"allocation": "uniform", "solver": "htp"},
    "default (knapsack over all ways of storing)": {"solver": "htp"},
}


class _NoWeights(Weights):
    def read(self, names):
        raise AssertionError("nothing is read here")


def opened(config: tf.PretrainedConfig) -> OpenModel:
    """A model on the meta device, as a streamed one is before it runs."""
    cls = tf.Qwen3MoeForCausalLM if config.model_type == "qwen3_moe" else tf.LlamaForCausalLM
    with torch.device("meta"):
        model = cls._from_config(config, dtype=torch.bfloat16)
    experts = tuple(split_experts(model))
    return OpenModel(model.float(), None, {}, "", _NoWeights(), torch.device("cpu"), Path(), True, experts)


def mapped_of(model: torch.nn.Module) -> ModelMap:
    """The layers as a run would find them."""
    blocks = tuple(find_blocks(model))
    layers = []
    for index, block in enumerate(blocks):
        for name, module in model.get_submodule(block).named_modules(prefix=block):
            if is_linear(module):
                parent, _, own = name.rpartition(".")
                source = f"{parent}.{SHARED.get(own, own)}"
                kind = name.removeprefix(f"{block}.")
                layers.append(Layer(name, index, kind, source, module.in_features, module.out_features, False))
    return ModelMap(blocks, tuple(layers))


def account(config: tf.PretrainedConfig, recipe: dict) -> dict:
    settings = CompressionConfig.from_dict(recipe)
    source = opened(config)
    mapped = mapped_of(source.model)
    groups = form_groups(mapped.layers, "natural")
    samples, seq_len = settings.calibration.samples, settings.calibration.seq_len
    windows = torch.zeros(samples, seq_len, dtype=torch.int64)
    predicted = plan_memory(MappedModel(source, mapped, tuple(groups), windows), settings, 1, None).predicted
    method, _ = choose_method(settings)
    inputs = {layer.source: layer.in_features for layer in mapped.layers}
    parameters = sum(p.numel() for p in source.model.parameters())
    hidden = 4 * windows.numel() * config.hidden_size
    solving = profiling = 0.0
    families = families_of(settings, method) if settings.allocation != "uniform" else None
    for group in groups:
        least = min(group.in_features, sum(group.out_features))
        factors = Factors(int(0.85 * least), int(0.425 * least))
        solving += costs.solving(factors, group.in_features, group.out_features, method.solver)
        if families is not None:
            profiling += costs.profiling(group.in_features, group.out_features, families)
    gib = 2**30
    return {
        "parameters": parameters,
        "layers": len(mapped.layers),
        "tokens": windows.numel(),
        "dense_gib": 2 * parameters / gib,
        "block_float32_gib": max(
            sum(p.nbytes for p in source.model.get_submodule(name).parameters()) for name in mapped.blocks
        ) / gib,
        "memory_gib": {
            "one_block_and_its_grams": (predicted.weights + predicted.grams) / gib,
            "activations_if_all_are_kept": hidden * (len(mapped.blocks) + 2) / gib,
            "largest_solve": predicted.solving / gib,
        },
        "disk_gib": {
            "statistics": sum(4 * d * (d + 1) for d in inputs.values()) / gib,
            "activations_at_most": hidden * (len(mapped.blocks) + 2) / gib,
            "records_and_result_at_20_percent": 2 * 0.8 * 2 * parameters / gib,
        },
        "read_gib": {
            "fingerprint_and_map": 2 * 2 * parameters / gib,
            "calibration_per_part": 2 * 2 * parameters / gib,
            "profile_and_solve_each": (2 * parameters + sum(
                4 * d * (d + 1) for group in groups for d in {la.source: la.in_features for la in group.layers}.values()
            )) / gib,
        },
        # Forwards twice and backwards once through all weights that a token meets.
        "calibration_flop": 2 * 3 * windows.numel() * active(source, config),
        "core_hours": {"solving": solving / 3600, "profiling": profiling / 3600},
    }  # fmt: skip


def active(source: OpenModel, config: tf.PretrainedConfig) -> int:
    """Parameters that one token meets."""
    chosen = getattr(config, "num_experts_per_tok", None)
    total = 0
    for name, parameter in source.model.named_parameters():
        inside = any(name.startswith(f"{expert}.") for expert in source.experts)
        total += parameter.numel() * chosen // config.num_experts if inside else parameter.numel()
    return total


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = {
        name: {label: account(config, recipe) for label, recipe in RECIPES.items()} for name, config in MODELS.items()
    }
    print(save_result("scaling", {"models": found}))
    for name, recipes in found.items():
        for label, figures in recipes.items():
            print(f"\n{name}; {label}")
            for key, value in figures.items():
                print(f"  {key}: {value}")


if __name__ == "__main__":
    main()
