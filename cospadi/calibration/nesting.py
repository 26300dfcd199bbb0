"""Tensors in the nested arguments of a block."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Give nested tuples, lists and dicts with ``change`` applied to every tensor; anything else stays as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, change) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Give the tensors of nested tuples, lists and dicts, in the order of ``map_tensors``."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list):
        for item in value:
            yield from tensors_in(item)
    elif type(value) is dict:
        for item in value.values():
            yield from tensors_in(item)


def hidden_states(args: Any, kwargs: Any) -> Tensor | None:
    """Give the hidden states among a block's arguments: the first floating-point tensor; None if there is none."""
    return next((t for t in tensors_in((args, kwargs)) if t.is_floating_point()), None)


def count_tokens(args: Any, kwargs: Any) -> int:
    """Give how many tokens a block was given: the rows of its hidden states."""
    hidden = hidden_states(args, kwargs)
    if hidden is None:
        raise RuntimeError("a block received no floating-point tensor")
    return hidden.numel() // hidden.shape[-1]
