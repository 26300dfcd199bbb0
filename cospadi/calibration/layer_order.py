"""The order in which the inputs of a block's layers become final while its layers are replaced."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.calibration.nesting import count_tokens, map_tensors
from cospadi.errors import UsageError
from cospadi.models import Layer, ModelMap


def find_stages(model: nn.Module, mapped: ModelMap, run: Callable[[], Any]) -> list[list[tuple[Layer, ...]]]:
    """Divide the layers of each block into stages by running a model once on a small example.

    A layer belongs to the first stage at which everything that its input is computed from has been replaced: q, k and
    v, then o, then gate and up, then down.  What depends on what is read off the graph that autograd records, so that
    layers that merely run one after the other, as experts do, share a stage.  A layer that receives a part of the
    tokens comes after the layers before it that receive all of them: one of those may have chosen the part.

    Parameters
    ----------
    model : Module
        Left as it was.
    mapped : ModelMap
        Its blocks, and the layers that may be replaced.
    run : callable
        Runs the model on a few tokens.

    Returns
    -------
    list (blocks) of list (stages) of tuple of Layer
        Layers with a common source are in one stage; a block without layers has no stages.  Layers that the example did
        not reach are in the stage of those that differ in an index alone (other experts), or else in the last.

    Raises
    ------
    UsageError
        A layer runs more than once in a pass.
    RuntimeError
        The model switches gradients off, so that no graph is recorded.
    """
    tracer = _Tracer(model, mapped)
    try:
        tracer.watch()
        with torch.enable_grad():
            run()
    finally:
        tracer.release()
    return [
        _divide([la for la in mapped.layers if la.block == block], tracer.inputs) for block in range(len(mapped.blocks))
    ]


class _Tracer:
    """Notes for every source which layers of its block its input is computed from.

    Attributes
    ----------
    inputs : dict of str to set of str
        Layers by source, in the order in which the sources were first reached.
    """

    def __init__(self, model: nn.Module, mapped: ModelMap) -> None:
        self.inputs: dict[str, set[str]] = {}
        self._model, self._mapped = model, mapped
        self._marks: dict[Any, str] = {}  # the graph node of a layer's output; holding it keeps its identity
        self._whole: set[str] = set()  # layers of the present block that received all of its tokens
        self._tokens = 0
        self._handles: list[Any] = []

    def watch(self) -> None:
        for name in self._mapped.blocks:
            block = self._model.get_submodule(name)
            self._handles.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
        for name in dict.fromkeys(layer.source for layer in self._mapped.layers):
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._receive(name)))
        for layer in self._mapped.layers:
            module = self._model.get_submodule(layer.name)
            self._handles.append(module.register_forward_hook(self._produce(layer.name)))

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._marks.clear()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        # Only the block itself matters: what happened before is cut off, which keeps the graphs small.
        self._marks.clear()
        self._whole.clear()
        self._tokens = count_tokens(args, kwargs)
        return map_tensors(args, Tensor.detach), map_tensors(kwargs, Tensor.detach)

    def _receive(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not torch.is_grad_enabled():
                raise RuntimeError(f"{name}: the model switches gradients off, so the order of its layers is not known")
            if name in self.inputs:
                raise UsageError(
                    f"{name} runs more than once in a pass, which sequential calibration does not know: exclude it"
                )
            self.inputs[name] = {self._marks[node] for node in _ancestors(args[0].grad_fn) if node in self._marks}
            if args[0].numel() // args[0].shape[-1] != self._tokens:
                self.inputs[name] |= self._whole

        return hook

    def _produce(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # A new leaf ends the graph here, whether or not the weights require gradients; its clone may be changed in
            # place, which a leaf may not.
            output = output.detach().requires_grad_().clone()
            self._marks[output.grad_fn] = name
            if output.numel() // output.shape[-1] == self._tokens:
                self._whole.add(name)
            return output

        return hook


def _ancestors(node: Any) -> Iterator[Any]:
    """Give a node of autograd's graph and all nodes that it is computed from."""
    found, pending = set(), [node]
    while pending:
        node = pending.pop()
        if node is None or node in found:
            continue
        found.add(node)
        pending.extend(after for after, _ in node.next_functions)
        yield node


def _divide(layers: list[Layer], inputs: dict[str, set[str]]) -> list[tuple[Layer, ...]]:
    """Give the stages of one block: a source is one stage after the latest of the layers that it depends on."""
    level: dict[str, int] = {}  # by source
    sources = {layer.name: layer.source for layer in layers}
    own = set(sources.values())
    for source in [name for name in inputs if name in own]:
        level[source] = 1 + max((level[sources[name]] for name in inputs[source]), default=-1)
    last = max(level.values(), default=0)
    siblings: dict[str, int] = {}
    for layer in layers:
        if layer.source in level:
            kind = _pattern(layer.kind)
            siblings[kind] = max(siblings.get(kind, 0), level[layer.source])
    levels = [level.get(layer.source, siblings.get(_pattern(layer.kind), last)) for layer in layers]
    return [tuple(la for la, at in zip(layers, levels, strict=True) if at == stage) for stage in sorted(set(levels))]


def _pattern(kind: str) -> str:
    """Give a layer's name within its block with every index replaced by a star."""
    return ".".join("*" if part.isdecimal() else part for part in kind.split("."))
