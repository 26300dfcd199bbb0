"""Passes that halt between blocks, where the present block can be run again and again."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.activations import ActivationCache
from cospadi.calibration.collectors import Collector
from cospadi.calibration.lockstep import Lockstep
from cospadi.calibration.nesting import count_tokens, hidden_states, map_tensors
from cospadi.models import weight_matrix


class _Reached(BaseException):
    """Ends the run of a block when all inputs that are wanted have been seen; no model catches it."""


class _Inputs(Collector[Tensor]):
    """Keeps the input of each layer and ends the run when it has all of them."""

    def observe(self, name: str, inputs: Tensor) -> None:
        # A clone, as the block may go on to work on the tensor in place.
        self.statistics[name] = inputs.detach().clone()
        if len(self.statistics) == len(self.layers):
            raise _Reached


class BlockPasses:
    """The passes of all batches through one model, and what each was given at the entrance of the present block.

    Between two blocks every pass halts, as in ``Lockstep``; meanwhile the present block can be run on what it was
    given, any number of times, without any pass noticing.

    Parameters
    ----------
    model : Module
        In evaluation mode.
    blocks : sequence of str
        Names of the blocks, from the first on, in the order in which the model runs them.
    call : callable
        Runs the model on one batch.
    batches : sequence
        Arguments of ``call``.
    cache : ActivationCache, optional
        Where the hidden states wait.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        call: Callable[[Any], Any],
        batches: Sequence[Any],
        cache: ActivationCache | None = None,
    ) -> None:
        self._model = model
        self._blocks = [model.get_submodule(name) for name in blocks]
        self._begin = lambda: Lockstep(self._blocks, call, batches, cache)
        self._lockstep = self._begin()
        self._given: dict[int, tuple[Any, Any]] = {}  # by batch
        self._next = 0
        self._busy = False
        self._stack = ExitStack()

    def __enter__(self) -> "BlockPasses":
        with ExitStack() as stack:
            for block in self._blocks:
                # Registered before the lockstep's hook, in which the pass halts.
                stack.callback(block.register_forward_pre_hook(self._keep, with_kwargs=True).remove)
            self._lockstep.__enter__()
            stack.callback(lambda: self._lockstep.__exit__(None, None, None))  # whichever it is then
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._given.clear()
        self._stack.close()

    def advance(self) -> None:
        """Run the present block in every pass, to its end."""
        # What a pass was given is dropped when it arrives at the next block, so that one set of hidden states is alive.
        self._next = 0
        self._lockstep.advance()

    def restart(self, n_blocks: int) -> None:
        """Run every pass from the start through the first blocks."""
        self._lockstep.__exit__(None, None, None)
        self._lockstep, self._next = self._begin(), 0
        self._lockstep.__enter__()
        for _ in range(n_blocks):
            self.advance()

    def inputs(self, block: int, batch: int, names: Sequence[str]) -> tuple[int, dict[str, Tensor]]:
        """Run the present block on a batch as far as some layers; give its number of tokens and their inputs."""
        # Clones, as a block may change the hidden states in place; these may wait in a file.
        hidden = hidden_states(*self._given[batch])
        args, kwargs = map_tensors(
            self._given[batch], lambda t: (self._lockstep.waiting(batch) if t is hidden else t).clone()
        )
        layers = {name: self._model.get_submodule(name) for name in names}
        self._busy = True
        try:
            with torch.no_grad(), _Inputs(layers) as collector, suppress(_Reached):
                self._blocks[block](*args, **kwargs)
        finally:
            self._busy = False
        return count_tokens(args, kwargs), collector.statistics

    @property
    def device(self) -> torch.device:
        """Where the hidden states are."""
        hidden = hidden_states(*self._given[0])
        return torch.device("cpu") if hidden is None else hidden.device

    def weight(self, name: str) -> Tensor:
        """Give W of a layer, a view."""
        return weight_matrix(self._model.get_submodule(name))

    def _keep(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._busy:
            self._given[self._next] = args, kwargs
            self._next += 1
