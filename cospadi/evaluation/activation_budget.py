"""The host memory that a streamed evaluation takes, and the share of it that hidden states may take."""

import re

from torch import Tensor, nn

from cospadi.backends import SparseLinear
from cospadi.errors import UsageError
from cospadi.evaluation.streaming import StreamedModel
from cospadi.models import BATCH, LIBRARIES, gib, loading_bytes, outside_bytes, resident_bytes, trim_heap

LOGITS_BYTES = 2**27
"""Most bytes of the logits of a batch of several windows."""
_CHUNKS = 2**26
"""Bytes that the NLL takes beside the logits."""


def windows_per_batch(vocabulary: int, window: int, most: int = 4) -> int:
    """Give the windows per batch, at most ``most``: fewer if the vocabulary makes their logits large."""
    return max(1, min(most, LOGITS_BYTES // (4 * window * vocabulary)))


def activation_budget(source: StreamedModel, windows: Tensor, size: int, limit: int) -> int | None:
    """Give the bytes of hidden states that may be kept in memory; None, as on a GPU, for no limit.

    Parameters
    ----------
    source : StreamedModel
    windows : Tensor, shape (n_windows, window), int64
    size : int
        Windows per batch.
    limit : int
        Bytes that the process may take.

    Raises
    ------
    UsageError
        The limit is too low; the text gives the least that is enough.
    """
    if source.device.type != "cpu":
        return None
    config, tokens = source.model.config.get_text_config(), size * windows.shape[1]
    blocks = [source.model.get_submodule(name) for name in source.blocks]
    walking = max(_block_bytes(block) + int(4 * tokens * _widths(block, config) * BATCH) for block in blocks)
    # A slice of the logits of several windows is a copy, and so is what caps them.
    copies = 1 + (size > 1) + 2 * (getattr(config, "final_logit_softcapping", None) is not None)
    logits = 4 * tokens * config.vocab_size * copies + _CHUNKS
    head = loading_bytes(outside_bytes(source.model, source.blocks)) + logits
    hidden = 4 * config.hidden_size
    trim_heap()
    baseline = resident_bytes() + LIBRARIES
    least = baseline + max(walking, head) + 2 * tokens * hidden
    if limit < least:
        raise UsageError(
            f"max_memory {gib(limit)} is too little for the evaluation, which needs at least {gib(least)} "
            f"({gib(baseline)} for the libraries, {gib(walking)} for a block and a batch in it, {gib(head)} for "
            f"the head and its logits): allow that much, or use shorter windows"
        )
    return min(windows.numel() * hidden, limit - baseline - max(walking, head))


def _block_bytes(block: nn.Module) -> int:
    """Give the bytes of a block while it runs: its tensors, one of them as stored, and what backends prepare."""
    tensors = [tensor.nbytes for tensor in (*block.parameters(), *block.buffers())]
    prepared = borrowed = 0
    owners: dict[int, SparseLinear] = {}
    inner = set(map(id, block.modules()))
    for layer in block.modules():
        if isinstance(layer, SparseLinear):
            prepared += 4 * layer.n_atoms * layer.out_features
            owners[id(layer.owner)] = layer.owner
    for owner in owners.values():
        prepared += 4 * owner.in_features * owner.n_atoms
        if id(owner) not in inner:
            borrowed += sum(getattr(owner, name).nbytes for name in owner.dictionary_names)
    return sum(tensors) + max(tensors) + prepared + borrowed


def _widths(block: nn.Module, config: object) -> int:
    """Sum the input and output widths of a block's layers for one token, over all experts that are active for it."""
    chosen = int(getattr(config, "num_experts_per_tok", None) or 1)
    widths: dict[str, int] = {}
    for name, module in block.named_modules():
        kind = re.sub(r"\.\d+\b", "", name)  # experts are alike
        times = chosen if kind != name else 1
        if isinstance(module, SparseLinear):
            widths[kind] = times * (module.in_features + module.n_atoms + module.out_features)
        else:
            for own, tensor in module.named_parameters(recurse=False):
                if tensor.ndim > 1:
                    fused = chosen if tensor.ndim > 2 else times
                    widths[f"{kind}.{own}"] = fused * (tensor.shape[-1] + tensor.shape[-2])
    return sum(widths.values())
