"""Which weights of a model are in memory: those of the block that runs, and of the others nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.models.host_memory import trim_heap
from cospadi.models.weights import Weights

OUTSIDE = -1
"""Stands for the modules outside the blocks: embeddings, final norm, head."""


class Residency:
    """Loads the weights of a block when the block runs and drops them when another one does.

    Modules outside the blocks are loaded one by one when they run, and dropped when a block does.  What belongs to a
    module that contains blocks is loaded once and stays.

    Parameters
    ----------
    model : Module
        What is to be loaded is on the meta device, in the dtype that it is wanted in.
    blocks : sequence of str
        Names of the blocks.
    weights : Weights
        Where to read from.
    device : torch.device
        Where to put what is read.
    keep : bool
        Never drop anything: for models that fit.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], weights: Weights, device: torch.device, keep: bool = False
    ) -> None:
        self._weights, self._device, self._keep = weights, device, keep
        self.blocks = tuple(blocks)
        self._loaded: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
        self._units: list[tuple[int, str, nn.Module]] = []
        inside = tuple(f"{name}." for name in self.blocks)
        around = {name.rpartition(".")[0] for name in self.blocks}
        always = []
        for name, module in model.named_modules():
            if name in self.blocks:
                self._units.append((self.blocks.index(name), name, module))
            elif not name.startswith(inside) and any(tensor.is_meta for tensor in _own(module).values()):
                if any(f"{outer}.".startswith(f"{name}." if name else "") for outer in around):
                    always.append((name, module))
                else:
                    self._units.append((OUTSIDE, name, module))
        for name, module in always:
            self._load(name, module, recurse=False)

    @contextmanager
    def attached(self) -> Iterator["Residency"]:
        """Load and drop by itself for the time being, whenever a module runs."""
        before = [(module, module.__dict__.get("forward")) for _, _, module in self._units]
        try:
            for index, name, module in self._units:
                module.__dict__["forward"] = partial(self._run, index, name, module, module.forward)
            yield self
        finally:
            for module, forward in before:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            if not self._keep:
                self.drop()

    def enter(self, block: str) -> None:
        """Have the weights of a block in memory, and of no other one unless all are kept."""
        self._enter(self.blocks.index(block))

    def _enter(self, block: int) -> None:
        if block in self._loaded:
            return
        if not self._keep:
            self.drop()
        name, module = next((name, module) for index, name, module in self._units if index == block)
        self._loaded[block] = self._load(name, module, recurse=True)

    def load_all(self) -> None:
        """Load everything there is."""
        for index, name, module in self._units:
            if index not in self._loaded or index == OUTSIDE:
                self._loaded.setdefault(index, []).extend(self._load(name, module, recurse=index != OUTSIDE))

    def drop(self) -> None:
        """Drop all weights that a module's next run loads again."""
        for loaded in self._loaded.values():
            for module, own, empty in loaded:
                _place(module, own, empty)
        self._loaded.clear()
        trim_heap()

    def _run(self, index: int, name: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kw: Any) -> Any:
        if index != OUTSIDE:
            self._enter(index)
        elif any(tensor.is_meta for tensor in _own(module).values()):
            if not self._keep:
                self._drop_blocks()
            self._loaded.setdefault(OUTSIDE, []).extend(self._load(name, module, recurse=False))
        return forward(*args, **kw)

    def _drop_blocks(self) -> None:
        outside = self._loaded.pop(OUTSIDE, None)
        self.drop()
        if outside is not None:
            self._loaded[OUTSIDE] = outside

    def _load(self, name: str, module: nn.Module, recurse: bool) -> list[tuple[nn.Module, str, Tensor]]:
        """Put real tensors in place of empty ones, and give what was there."""
        places = {}
        for inner, child in module.named_modules(prefix=name) if recurse else [(name, module)]:
            for own, tensor in _own(child).items():
                if tensor.is_meta:
                    places[f"{inner}.{own}" if inner else own] = (child, own, tensor)
        read = self._weights.read(places)
        for full, (child, own, empty) in places.items():
            tensor = read.pop(full).to(self._device, empty.dtype)
            _place(child, own, nn.Parameter(tensor, empty.requires_grad) if own in child._parameters else tensor)
        return list(places.values())


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Give the parameters and buffers of a module without those of its children."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _place(module: nn.Module, own: str, tensor: Tensor) -> None:
    if own in module._parameters:
        module._parameters[own] = tensor  # type: ignore[assignment]
    else:
        module._buffers[own] = tensor
