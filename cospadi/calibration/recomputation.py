"""A model made ready for a backward pass that wants neither weight gradients nor a tape of all activations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode (no dropout) with no gradients of its weights; every flag comes back."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextmanager
def checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute the inside of each block in the backward pass instead of keeping it.

    Wraps the blocks' ``forward`` for the time being.  transformers' own switch is not used: it needs the model in
    training mode, exists for some architectures only, and cannot be put back exactly.
    """
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            # In evaluation mode nothing is random, so there is no state of generators to keep.
            wrapped = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            block.__dict__["forward"] = wrapped
        yield
    finally:
        for block, forward in before:
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward
