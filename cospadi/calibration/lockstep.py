"""Run all calibration batches through a model block by block."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import greenlet
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cospadi.calibration.activations import ActivationCache, Held
from cospadi.calibration.nesting import hidden_states


@dataclass(frozen=True)
class WalkedModel:
    """A model on its way through the calibration batches.

    Attributes
    ----------
    module : Module
        In evaluation mode.
    call : callable
        Runs it on one batch, see ``forward_call``.
    cache : ActivationCache, optional
        Where its hidden states wait; without it they are in memory.
    """

    module: nn.Module
    call: Callable[[Any], Any]
    cache: ActivationCache | None = None


class Lockstep:
    """Forward passes that advance together, one block at a time.

    Each batch runs in a coroutine of its own that halts wherever the model enters a block.  Between two blocks only the
    hidden states of the batches are alive, and the model's own code decides what each block receives (masks, position
    embeddings, anything an architecture adds between its blocks), so no architecture needs an adapter.

    Parameters
    ----------
    blocks : sequence of Module
        The blocks in the order in which the model runs them.
    call : callable
        Runs the model on one batch.
    batches : sequence
        Arguments of ``call``.
    cache : ActivationCache, optional
        Where the hidden states wait; without it in memory, however large.

    Examples
    --------
    >>> with Lockstep(blocks, call, batches) as walk:
    ...     for block in blocks:
    ...         walk.advance()  # every batch has now passed this block
    """

    _grad = False
    """Whether the code between the blocks records gradients."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        call: Callable[[Any], Any],
        batches: Sequence[Any],
        cache: ActivationCache | None = None,
    ) -> None:
        self._blocks = list(blocks)
        self._call = call
        self._batches = list(batches)
        self._cache = ActivationCache() if cache is None else cache
        self._handles: list[RemovableHandle] = []
        self._passes: list[greenlet.greenlet] = []
        self._waiting: dict[int, Held] = {}  # by batch
        self._next = 0

    def __enter__(self) -> "Lockstep":
        for block in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._at_entrance, with_kwargs=True))
        # The head comes when all batches have passed the blocks, if anyone asks for it.
        self._handles.append(self._blocks[-1].register_forward_hook(self._at_exit))
        try:
            for batch in self._batches:
                one = greenlet.greenlet(self._call)
                self._passes.append(one)
                at = self._switch(one, batch)
                if at is not self._blocks[0]:
                    raise RuntimeError("the model does not begin with the first block of the list")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def advance(self) -> None:
        """Run the next block in every pass.

        Raises
        ------
        RuntimeError
            The model did not run the blocks in the order given.
        """
        if self._next >= len(self._blocks):
            raise RuntimeError("all blocks have run")
        expected = self._blocks[min(self._next + 1, len(self._blocks) - 1)]
        for one in self._passes:
            if self._switch(one) is not expected:
                raise RuntimeError(f"the model left the order of its blocks after block {self._next}")
        self._next += 1

    def finish(self, take: Callable[[int, Any], None]) -> None:
        """Run what comes after the last block in every pass, and hand over the index of each batch and its result."""
        if self._next < len(self._blocks):
            raise RuntimeError("some blocks have not run")
        for index, one in enumerate(self._passes):
            result = self._switch(one)
            if not one.dead:
                raise RuntimeError("the model runs a block again after the last one")
            take(index, result)
            del result  # logits are large

    def waiting(self, index: int) -> Tensor:
        """Give the hidden states with which a batch waits, to be looked at only."""
        return self._cache.get(self._waiting[index])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for one in self._passes:
            if not one.dead:
                one.throw(greenlet.GreenletExit)
        for held in self._waiting.values():
            self._cache.drop(held)
        self._waiting.clear()
        self._passes.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _switch(self, one: greenlet.greenlet, *args: Any) -> Any:
        with torch.set_grad_enabled(self._grad):
            return one.switch(*args)

    def _at_entrance(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._halt(module, hidden_states(args, kwargs))

    def _at_exit(self, module: nn.Module, args: Any, output: Any) -> None:
        self._halt(module, hidden_states(output, {}))

    def _halt(self, module: nn.Module, hidden: Tensor | None) -> None:
        current = greenlet.getcurrent()
        if current not in self._passes or current.parent is None:
            return
        index = self._passes.index(current)
        if hidden is not None:
            self._waiting[index] = self._cache.hold(hidden, swap=True)
        current.parent.switch(module)
        if hidden is not None:
            held = self._waiting.pop(index)
            self._cache.put_back(held)
            self._resume(index, held)

    def _resume(self, index: int, held: Held) -> None:
        """Let a pass go on with the hidden states that it waited with."""
        self._cache.drop(held)


def forward_call(model: nn.Module, device: torch.device) -> Callable[[Any], Any]:
    """Give a function that runs a transformers model on token windows without keeping key-value caches."""
    extra: Mapping[str, Any] = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )

    def call(windows: torch.Tensor) -> Any:
        return model(input_ids=windows.to(device), **extra)

    return call
