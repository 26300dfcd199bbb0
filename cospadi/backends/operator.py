"""``cospadi::linear``: the product of compressed layers as one operator of torch.

torch.compile, torch.export and CUDA graphs see a single node for every backend.  The handle of a bundle
(``cospadi.backends.bundle``) names the layers.  The tensors are passed too, so that gradients and compiled graphs know
what the product depends on.
"""

import weakref
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor


class Runner(Protocol):
    """The methods that the operator calls on a bundle; ``member`` is -1 for all layers side by side."""

    def width(self, member: int) -> int:
        """Give the number of output features."""

    def run(self, x: Tensor, dictionary: list[Tensor], stored: list[Tensor], member: int) -> Tensor:
        """Give the product."""

    def gradients(
        self,
        gradient: Tensor,
        x: Tensor,
        dictionary: list[Tensor],
        stored: list[Tensor],
        member: int,
        wanted: list[bool],
    ) -> list[Tensor]:
        """Give the wanted gradients."""


_RUNNERS: weakref.WeakValueDictionary[int, Runner] = weakref.WeakValueDictionary()
_HANDLES = count()

_LIBRARY = torch.library.Library("cospadi", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor[] dictionary, Tensor[] stored, int bundle, int member) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "linear_backward(Tensor gradient, Tensor x, Tensor[] dictionary, Tensor[] stored, int bundle, int member, "
    "bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def register(runner: Runner) -> int:
    """Give a handle by which the operator finds a runner; the handle does not keep the runner alive."""
    handle = next(_HANDLES)
    _RUNNERS[handle] = runner
    return handle


@torch.library.impl(_LIBRARY, "linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, dictionary: list[Tensor], stored: list[Tensor], bundle: int, member: int) -> Tensor:
    return _RUNNERS[bundle].run(x, dictionary, stored, member)


@torch.library.register_fake("cospadi::linear", lib=_LIBRARY)
def _(x: Tensor, dictionary: list[Tensor], stored: list[Tensor], bundle: int, member: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], _RUNNERS[bundle].width(member)))


@torch.library.impl(_LIBRARY, "linear_backward", "CompositeExplicitAutograd")
def _linear_backward(
    gradient: Tensor,
    x: Tensor,
    dictionary: list[Tensor],
    stored: list[Tensor],
    bundle: int,
    member: int,
    wanted: list[bool],
) -> list[Tensor]:
    return _RUNNERS[bundle].gradients(gradient, x, dictionary, stored, member, wanted)


@torch.library.register_fake("cospadi::linear_backward", lib=_LIBRARY)
def _(
    gradient: Tensor,
    x: Tensor,
    dictionary: list[Tensor],
    stored: list[Tensor],
    bundle: int,
    member: int,
    wanted: list[bool],
) -> list[Tensor]:
    inputs = [x, *dictionary, *stored]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t, w in zip(inputs, wanted, strict=True) if w
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dictionary, stored, ctx.bundle, ctx.member = inputs
    ctx.sizes = len(dictionary), len(stored)
    ctx.save_for_backward(x, *dictionary, *stored)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    split = ctx.sizes[0]
    needs = ctx.needs_input_grad
    wanted = [needs[0], *needs[1], *needs[2]]
    found = iter(
        torch.ops.cospadi.linear_backward(gradient, x, tensors[:split], tensors[split:], ctx.bundle, ctx.member, wanted)
    )
    all_of_them = [next(found) if is_wanted else None for is_wanted in wanted]
    return all_of_them[0], all_of_them[1 : 1 + split], all_of_them[1 + split :], None, None


torch.library.register_autograd("cospadi::linear", _backward, setup_context=_save, lib=_LIBRARY)
