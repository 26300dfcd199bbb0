"""Run all calibration batches through a model block by block."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import greenlet
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


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

    Examples
    --------
    >>> with Lockstep(blocks, call, batches) as walk:
    ...     for block in blocks:
    ...         walk.advance()  # every batch has now passed this block
    """

    def __init__(self, blocks: Sequence[nn.Module], call: Callable[[Any], Any], batches: Sequence[Any]) -> None:
        self._blocks = list(blocks)
        self._call = call
        self._batches = list(batches)
        self._handles: list[RemovableHandle] = []
        self._passes: list[greenlet.greenlet] = []
        self._next = 0

    def __enter__(self) -> "Lockstep":
        for block in self._blocks:
            self._handles.append(block.register_forward_pre_hook(self._halt, with_kwargs=True))
        # After the last block nothing is of interest: halting at its exit saves the head and its logits.
        self._handles.append(self._blocks[-1].register_forward_hook(self._halt))
        try:
            for batch in self._batches:
                one = greenlet.greenlet(self._run)
                self._passes.append(one)
                with torch.no_grad():
                    at = one.switch(batch)
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
        for one in self._passes:
            with torch.no_grad():
                at = one.switch()
            expected = self._blocks[min(self._next + 1, len(self._blocks) - 1)]
            if at is not expected:
                raise RuntimeError(f"the model left the order of its blocks after block {self._next}")
        self._next += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for one in self._passes:
            if not one.dead:
                one.throw(greenlet.GreenletExit)
        self._passes.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _run(self, batch: Any) -> None:
        self._call(batch)

    def _halt(self, module: nn.Module, *_: Any) -> None:
        current = greenlet.getcurrent()
        if current in self._passes and current.parent is not None:
            current.parent.switch(module)


def forward_call(model: nn.Module, device: torch.device) -> Callable[[Any], Any]:
    """Give a function that runs a transformers model on token windows without keeping key-value caches."""
    import inspect

    extra: Mapping[str, Any] = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )

    def call(windows: torch.Tensor) -> Any:
        return model(input_ids=windows.to(device), **extra)

    return call
