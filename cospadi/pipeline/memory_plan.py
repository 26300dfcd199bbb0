"""Prediction of the host memory that a run takes, and how much of it the activations may have."""

from dataclasses import dataclass

from cospadi.errors import UsageError
from cospadi.events import Predicted
from cospadi.formats import MAX_SHARD_BYTES, grid_of
from cospadi.models import (
    BATCH,
    LIBRARIES,
    Group,
    OpenModel,
    gib,
    loading_bytes,
    outside_bytes,
    resident_bytes,
    trim_heap,
)
from cospadi.pipeline.mapped_model import MappedModel
from cospadi.recipe import CompressionConfig

_SOLVING = {
    "single-step": (1.9, 2.5, 6.4),
    "htp": (1.2, 5.6, 5.5),
    "output": (0.0, 14.2, 1.0),
    "whole-numbers": (3.1, 13.9, 5.9),
    "sparse": (3.9, 6.3, 0.0),
    "quantized": (1.8, 9.0, 0.0),
    "profile": (2.8, 4.8, 7.6),
}
"""Copies in float64 of a group's Gram, of its weight, and of a square of the weight's lesser side (on the side of the
outputs of that one) that a way of storing takes at most at a time while it is solved, and so for the profile of all
ways.  Measured, see benchmarks/solving_memory.py."""
_LOGITS = 3.0
"""The same for the model's head, over its logits."""


@dataclass(frozen=True)
class Budget:
    """What a run may take.

    Attributes
    ----------
    activations : int or None
        Bytes of activations that may wait in memory; None sets no limit.
    predicted : Predicted
        What the whole is expected to take.
    """

    activations: int | None
    predicted: Predicted


def plan_memory(model: MappedModel, config: CompressionConfig, batch_size: int, limit: int | None) -> Budget:
    """Predict the peak of each stage, and divide what is allowed.

    Weights and activations count where the model runs on a CPU; on a GPU they are not in the host's memory.

    Parameters
    ----------
    model : MappedModel
    config : CompressionConfig
    batch_size : int
        Windows that really run at a time.
    limit : int, optional
        Bytes that the process may take.

    Raises
    ------
    UsageError
        The limit is too low for what cannot be divided; tells the least that is enough.
    """
    source, mapped, windows, sensitive = model.source, model.map, model.windows, config.needs_sensitivities
    trim_heap()
    baseline = resident_bytes() + LIBRARIES
    on_host = source.device.type == "cpu"
    sequential = config.calibration.order == "sequential"
    seq_len = windows.shape[1]
    tokens = batch_size * seq_len
    blocks = [_block_bytes(source, name) for name in mapped.blocks]
    modules = outside_bytes(source.model, mapped.blocks)
    outside = loading_bytes(modules) if on_host else 0
    block = max(blocks) if on_host else 0
    copies = 2 if sequential and config.calibration.mixing > 0 else 1
    weights = (
        (max(block * copies, outside) if source.streamed else sum(blocks) * copies + sum(modules)) if on_host else 0
    )

    by_block: dict[int, dict[str, int]] = {}
    through: dict[int, float] = {}
    for layer in mapped.layers:
        by_block.setdefault(layer.block, {})[layer.source] = layer.in_features
        share = _share_of_tokens(source, layer.name)
        through[layer.block] = through.get(layer.block, 0.0) + share * (layer.in_features + layer.out_features)
    kinds = 2 if config.token_weights else 1
    grams = max(sum(8 * kinds * d * d for d in widths.values()) for widths in by_block.values())
    # While one is summed its product in float32; while it is written half of it, and a quarter on the way there.
    grams += 6 * max(d * d for widths in by_block.values() for d in widths.values())
    working = int(4 * tokens * max(through.values()) * BATCH) if on_host else 0
    head = source.model.get_output_embeddings() if sensitive else None
    logits = 0 if head is None else int(4 * tokens * head.weight.shape[0] * _LOGITS)

    hidden = 4 * windows.numel() * int(source.model.config.get_text_config().hidden_size)
    waiting = hidden * (len(mapped.blocks) + 2 if sensitive else 2 * copies) if on_host else 0
    solving = max(solving_bytes(group, config) for group in model.groups)
    written = sum(2 * layer.in_features * layer.out_features for layer in mapped.layers)
    writing = min(MAX_SHARD_BYTES, written + outside) + max(
        2 * g.in_features * sum(g.out_features) for g in model.groups
    )

    resident = weights if not source.streamed else 0
    calibrating = (block * copies if source.streamed else 0) + grams + working
    turning = (outside if source.streamed else 0) + logits if sensitive else 0
    fixed = resident + max(calibrating, turning)
    least = baseline + max(
        fixed + 2 * hidden // max(1, len(windows.split(batch_size))), resident + solving, resident + writing
    )
    if limit is not None and limit < least:
        raise UsageError(
            f"max_memory {gib(limit)} is too little: this run needs at least {gib(least)} ({gib(baseline)} for "
            f"the libraries, {gib(weights)} weights, {gib(grams)} Grams, {gib(max(working, logits))} a batch, "
            f"{gib(solving)} for the largest group); allow that much, or take a smaller batch_size or seq_len"
        )
    allowed = None if limit is None else min(waiting, limit - baseline - fixed)
    activations = waiting if allowed is None else allowed
    peak = baseline + max(fixed + activations, resident + solving, resident + writing)
    predicted = Predicted(baseline, weights, grams, activations + max(working, logits), solving, peak, limit)
    return Budget(allowed, predicted)


def _share_of_tokens(source: OpenModel, name: str) -> float:
    """Give which part of the tokens a layer receives on average: an expert's those that the router sends there."""
    experts = next((e for e in source.experts if name.startswith(f"{e}.")), None)
    chosen = getattr(source.model.config.get_text_config(), "num_experts_per_tok", None)
    if experts is None or chosen is None:
        return 1.0
    return float(min(1.0, chosen / source.model.get_submodule(experts).num_experts))


def solving_bytes(group: Group, config: CompressionConfig) -> int:
    """Give what profiling and solving a group takes at most, its weights and Grams included."""
    d, n = group.in_features, sum(group.out_features)
    most = max(
        sum(a * b for a, b in zip(_SOLVING[w], solving_terms(w, d, n), strict=True)) for w in _ways(group, config)
    )
    sources = len({layer.source for layer in group.layers})
    several = sources * d * d if sources > 1 else 0  # a Gram for each, and their mean
    joined = d * n / 2 if len(group.layers) > 1 else 0
    return int(8 * (most + several + joined))


def solving_terms(way: str, d: int, n: int) -> tuple[int, int, int]:
    """Give the sizes that the memory of a way of storing d inputs and n outputs is a sum of, see ``_SOLVING``."""
    return d * d, d * n, (n if way == "output" else min(d, n)) ** 2


def _ways(group: Group, config: CompressionConfig) -> list[str]:
    """Name the ways of storing a group that the recipe may come to."""
    whole = config.value_dtype == "auto" or grid_of(config.value_dtype) is not None
    if config.allocation == "uniform":
        found = ["single-step"] if config.solver in ("single-step", "svd") else ["single-step", "htp"]
        return [*found, *(["whole-numbers"] if whole and config.value_dtype != "auto" else [])]
    found = ["profile"]
    if config.storage != "factors":
        found.append("quantized")
    if config.storage != "quantized" and config.dictionary != "learned":
        found.append("sparse")
    if config.storage != "quantized" and config.dictionary != "identity":
        found += ["single-step", "htp"]
        offered = len(group.layers) == 1 and group.in_features > sum(group.out_features)
        found += ["output"] if config.side == "output" or (config.side == "auto" and offered) else []
        found += ["whole-numbers"] if whole else []
    return found


def _block_bytes(source: OpenModel, name: str) -> int:
    return sum(tensor.nbytes for tensor in source.model.get_submodule(name).parameters())
