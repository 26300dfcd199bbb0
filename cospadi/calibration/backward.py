"""All calibration batches through a model and back, one block at a time.

On the way forwards nothing of a block is kept but what it was given; on the way back each block runs again, with
gradients (Chen et al. 2016, arXiv 1604.06174).  Both ways all batches pass a block before any goes on, so that one
block's weights and one block's sums are needed at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import greenlet
import torch
from torch import Tensor, nn

from cospadi.calibration.activations import ActivationCache, Held
from cospadi.calibration.lockstep import Lockstep
from cospadi.calibration.nesting import hidden_states, map_tensors, tensors_in


class _Slot:
    """The gradient at a tensor that leaves a block, as far as it has come back."""

    def __init__(self, cache: ActivationCache) -> None:
        self._cache = cache
        self._held: Held | None = None

    def add(self, gradient: Tensor) -> None:
        before = self.take()
        if before is not None:
            gradient = before + gradient
        self._held = self._cache.hold(gradient.detach())

    def take(self) -> Tensor | None:
        """Give the gradient, None if none has come, and forget it."""
        if self._held is None:
            return None
        gradient = self._cache.get(self._held)
        self._cache.drop(self._held)
        self._held = None
        return gradient


class _Cut(torch.autograd.Function):
    """Begins a graph at a tensor that leaves a block; the gradient that arrives there goes into the slot."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, box: list[Tensor], slot: _Slot) -> Tensor:
        ctx.slot = slot
        return box[0]  # not an argument itself: autograd would make a view of it, which nobody may change in place

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.slot.add(gradients[0])
        return None, None, None


class _Passage:
    """One batch's passage through one block.

    Attributes
    ----------
    given : tuple
        Arguments, with an empty tensor in place of every one.
    tensors : list of (Tensor or Held, _Slot or Tensor or None)
        The tensors of the arguments, in order, with where their gradient goes: to what left an earlier block, or
        through the graph of a tensor that was computed from that.
    leaving : list of _Slot
        Of the floating-point tensors that the block gave.
    """

    def __init__(self, given: Any) -> None:
        self.given = given
        self.tensors: list[tuple[Tensor | Held, _Slot | Tensor | None]] = []
        self.leaving: list[_Slot] = []


class GradientPasses(Lockstep):
    """Forward passes that can go back.

    Parameters
    ----------
    blocks, call, batches, cache
        As of ``Lockstep``; what the blocks were given is kept in the cache until they have gone back.

    Attributes
    ----------
    finite : bool
        Whether everything that left a block so far is finite.

    Examples
    --------
    >>> with GradientPasses(blocks, call, batches, cache) as walk:
    ...     for block in blocks:
    ...         walk.advance()
    ...     walk.turn(loss_gradient)  # called with the index of a batch and its result
    ...     for block in reversed(range(len(blocks))):
    ...         walk.back(block, backward)  # called with a batch's index, the outputs and their gradients
    """

    _grad = True

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        call: Callable[[Any], Any],
        batches: Sequence[Any],
        cache: ActivationCache | None = None,
    ) -> None:
        super().__init__(blocks, call, batches, cache)
        self.finite = True
        self._token = torch.zeros((), requires_grad=True)
        self._passages: dict[tuple[int, int], _Passage] = {}
        self._kept: dict[int, Held] = {}  # by batch, from the entrance of a block to its run
        # Where a tensor that left a block comes in again as it is, its gradient needs no graph.
        self._known: dict[int, dict[int, tuple[Tensor, int, _Slot]]] = {i: {} for i in range(len(self._batches))}
        self._forwards = [block.__dict__.get("forward") for block in self._blocks]

    def __enter__(self) -> "GradientPasses":
        for index, block in enumerate(self._blocks):
            block.__dict__["forward"] = partial(self._run, index, block.forward)
        try:
            super().__enter__()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._restore()
        super().__exit__(*exception)
        for passage in self._passages.values():
            for tensor, _ in passage.tensors:
                if isinstance(tensor, Held):
                    self._cache.drop(tensor)
            for slot in passage.leaving:
                slot.take()
        self._passages.clear()
        self._known.clear()

    def turn(self, gradient: Callable[[int, Any], tuple[Tensor, Tensor]]) -> None:
        """Run what comes after the last block, and back through it.

        Parameters
        ----------
        gradient : callable
            Given the index of a batch and the model's result, gives an output and the gradient at it.
        """

        def take(index: int, result: Any) -> None:
            output, at_output = gradient(index, result)
            with torch.enable_grad():
                torch.autograd.backward([output], [at_output], retain_graph=True)

        self.finish(take)

    def back(self, block: int, backward: Callable[[int, list[Tensor], list[Tensor]], None]) -> None:
        """Run a block again in every pass, and back through it; the blocks come in reverse order.

        Parameters
        ----------
        block : int
            Its index.
        backward : callable
            Given the index of a batch, the tensors that the block gave and the gradients at them; runs autograd.
        """
        for index in range(len(self._batches)):
            passage = self._passages.pop((block, index))
            gradients = [slot.take() for slot in passage.leaving]
            given = [self._cache.get(t) if isinstance(t, Held) else t for t, _ in passage.tensors]
            for tensor, _ in passage.tensors:
                if isinstance(tensor, Held):
                    self._cache.drop(tensor)
            with torch.enable_grad():
                leaves = [
                    tensor.detach().requires_grad_() if wire is not None else tensor
                    for tensor, (_, wire) in zip(given, passage.tensors, strict=True)
                ]
                rest = iter(leaves)
                # A block may change what it is given in place, which a leaf does not allow.
                args, kwargs = map_tensors(passage.given, partial(_next_clone, rest))
                outputs = [t for t in tensors_in(self._blocks[block](*args, **kwargs)) if t.is_floating_point()]
                reached = [
                    (output, gradient)
                    for output, gradient in zip(outputs, gradients, strict=True)
                    if gradient is not None and output.requires_grad
                ]
                backward(index, [output for output, _ in reached], [gradient for _, gradient in reached])
            for leaf, (_, wire) in zip(leaves, passage.tensors, strict=True):
                if leaf.grad is None:
                    continue
                if isinstance(wire, _Slot):
                    wire.add(leaf.grad)
                elif wire is not None:
                    # What the model computes between its blocks; several blocks may receive it.
                    torch.autograd.backward([wire], [leaf.grad], retain_graph=True)

    def _resume(self, index: int, held: Held) -> None:
        self._kept[index] = held

    def _run(self, block: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for the forward of a block."""
        current = greenlet.getcurrent()
        if current not in self._passes:
            return forward(*args, **kwargs)  # on the way back
        index = self._passes.index(current)
        known = self._known[index]
        passage = self._passages[block, index] = _Passage((args, kwargs))
        hidden, kept = hidden_states(args, kwargs), self._kept.pop(index, None)
        for tensor in tensors_in((args, kwargs)):
            there = known.get(id(tensor))
            wire: _Slot | Tensor | None = tensor if tensor.requires_grad else None
            if there is not None and there[0] is tensor and there[1] == tensor._version:
                wire = there[2]
            passage.tensors.append((kept if kept is not None and tensor is hidden else tensor.detach(), wire))
        passage.given = map_tensors((args, kwargs), lambda t: t.new_empty(0).detach())
        known.clear()
        with torch.no_grad():
            # Clones: the arguments are needed again as they are.
            own_args, own_kwargs = map_tensors((args, kwargs), lambda t: t.detach().clone())
            result = forward(*own_args, **own_kwargs)

        def cut(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            self.finite = self.finite and bool(torch.isfinite(tensor).all())
            slot = _Slot(self._cache)
            passage.leaving.append(slot)
            with torch.enable_grad():
                fresh: Tensor = _Cut.apply(self._token, [tensor], slot)
            known[id(fresh)] = fresh, fresh._version, slot
            return fresh

        return map_tensors(result, cut)

    def _restore(self) -> None:
        for block, forward in zip(self._blocks, self._forwards, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = forward


def _next_clone(tensors: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(tensors).clone()
