"""The linear layers of a model: which there are, in which blocks, and which of them receive the same input."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import UsageError


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a plain affine map: ``torch.nn.Linear`` or the ``Conv1D`` of GPT-2."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def weight_matrix(module: nn.Module) -> Tensor:
    """Give W, shape (in_features, out_features), a view of the module's weight."""
    return oriented(module, module.get_parameter("weight").detach())


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """Give W, shape (in_features, out_features), a view of a weight as the module stores it."""
    return weight.T if isinstance(module, nn.Linear) else weight


@dataclass(frozen=True)
class Layer:
    """One linear layer that may be compressed.

    Attributes
    ----------
    name : str
        Dotted module name.
    block : int
        Index of its block in the order of execution.
    kind : str
        Its name within the block, the same for the corresponding layers of all blocks.
    source : str
        Name of the first layer that receives the same input tensor (its own name if it is the first).
    in_features, out_features : int
        Shape of W.
    bias : bool
        Whether it adds a bias.
    """

    name: str
    block: int
    kind: str
    source: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class ModelMap:
    """The blocks of a model in the order in which they run, and the linear layers in them."""

    blocks: tuple[str, ...]
    layers: tuple[Layer, ...]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Give the repeated blocks (decoder or encoder layers) by name: the outermost module lists that hold linear layers.

    Raises
    ------
    UsageError
        The model has no such list.
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside and any(is_linear(m) for m in module.modules()):
            blocks.update({f"{name}.{key}": child for key, child in module.named_children()})
    if not blocks:
        raise UsageError(
            f"{type(model).__name__} has no list of blocks with linear layers: its architecture is not supported"
        )
    return blocks


def map_model(
    model: nn.Module,
    run: Callable[[], Any],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> ModelMap:
    """Find out how a model runs by running it once on a small example.

    Parameters
    ----------
    model : Module
        The model; left as it was.
    run : callable
        Runs the model on a few tokens.
    include, exclude : sequence of str
        Shell patterns over layer names.

    Raises
    ------
    UsageError
        A pattern matches no linear layer, or the model runs a block more than once per pass.
    """
    blocks = find_blocks(model)
    order: list[str] = []
    # The inputs are kept alive while the example runs, so that identity cannot be confused by reused memory.
    inputs: list[tuple[str, Tensor, int]] = []
    sources: dict[str, str] = {}
    handles = []

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if name in order:
                raise UsageError(
                    f"the model runs block {name} more than once in a pass: shared blocks are not supported"
                )
            order.append(name)

        return hook

    def receive(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            for earlier, tensor, version in inputs:
                if tensor is args[0] and version == tensor._version:
                    sources.setdefault(name, sources.get(earlier, earlier))
                    return
            sources.setdefault(name, name)
            inputs.append((name, args[0], args[0]._version))

        return hook

    try:
        for block_name, block in blocks.items():
            handles.append(block.register_forward_pre_hook(enter(block_name), with_kwargs=True))
            for name, module in block.named_modules(prefix=block_name):
                if is_linear(module):
                    handles.append(module.register_forward_pre_hook(receive(name)))
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()

    layers = []
    for index, block_name in enumerate(order):
        for name, module in blocks[block_name].named_modules(prefix=block_name):
            if is_linear(module):
                d1, d2 = weight_matrix(module).shape
                kind = name.removeprefix(f"{block_name}.")
                layers.append(Layer(name, index, kind, sources.get(name, name), d1, d2, module.bias is not None))
    return ModelMap(tuple(order), _select(model, layers, include, exclude))


def _select(model: nn.Module, layers: list[Layer], include: Sequence[str], exclude: Sequence[str]) -> tuple[Layer, ...]:
    names = [layer.name for layer in layers]
    for pattern in (*include, *exclude):
        if not fnmatch.filter(names, pattern):
            others = {type(m).__name__ for n, m in model.named_modules() if fnmatch.fnmatchcase(n, pattern)}
            found = f"only {', '.join(sorted(others))} modules, which cannot be compressed" if others else "nothing"
            raise UsageError(f"pattern {pattern!r} matches {found}; linear layers are named like {names[0]!r}")
    chosen = [
        layer
        for layer in layers
        if any(fnmatch.fnmatchcase(layer.name, p) for p in include)
        and not any(fnmatch.fnmatchcase(layer.name, p) for p in exclude)
    ]
    if not chosen:
        raise UsageError("include and exclude patterns leave no layer to compress")
    return tuple(chosen)
