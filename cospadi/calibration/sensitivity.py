"""One backward pass over the calibration tokens: which outputs of which layers the model's loss depends on."""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cospadi.calibration.backward import GradientPasses
from cospadi.calibration.labels import Labels, choose_labels, model_output
from cospadi.calibration.lockstep import WalkedModel
from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.errors import NumericalError, UsageError
from cospadi.models import Layer, ModelMap

_PER_HEAD, _PER_GRAM = 2.1, 0.6
"""Multiplications per token that take as long as the head and its loss, over its weights, and as one Gram, over its
entries; fitted to a run of SmolLM2, see benchmarks/progress.py."""
_MAX_LOGITS = 1 << 25
"""Logits of one batch (128 MiB in float32); a larger batch is divided, which changes the result by rounding only."""


class SensitivityCollector:
    """Sums squared output gradients and weighted Grams in the backward pass; owns its hooks.

    Inputs that the weighted Gram needs are saved through autograd with the rest of their block.

    Parameters
    ----------
    modules : mapping of str to Module
        The linear layers, by name; their weights need no gradient.
    layers : sequence of Layer
        What to know about them; layers of one source are taken together.
    weighted : bool
        Also sum the weighted Gram; see ``SourceStatistics``.
    note : str
        How the loss is defined.
    device : torch.device
        Where the sums are kept: that of the inputs.

    Attributes
    ----------
    statistics : dict of str to SourceStatistics
        What was collected, by source.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        layers: Sequence[Layer],
        *,
        weighted: bool = False,
        note: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        self._modules = modules
        self._members: dict[str, list[Layer]] = {}
        for layer in layers:
            self._members.setdefault(layer.source, []).append(layer)
        self._weighted = weighted
        self.statistics = {
            source: SourceStatistics(
                source,
                members[0].in_features,
                {layer.name: layer.out_features for layer in members},
                weighted=weighted,
                device=device,
                note=note,
            )
            for source, members in self._members.items()
        }
        self._handles: list[RemovableHandle] = []
        # A layer's call between its two forward hooks, and the inputs of each source whose weights are not complete.
        self._calls: dict[str, _Call] = {}
        self._pending: dict[str, _Pending] = {}

    def __enter__(self) -> "SensitivityCollector":
        for source, members in self._members.items():
            for layer in members:
                module = self._modules[layer.name]
                counts = layer is members[0]  # one member stands for the input that all of them receive
                self._handles.append(module.register_forward_pre_hook(partial(self._receive, source, layer, counts)))
                self._handles.append(module.register_forward_hook(partial(self._leave, source, layer)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._calls.clear()
        self._pending.clear()

    def backward(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], n_tokens: int) -> None:
        """Run the backward pass of one batch from the gradients at what was computed from the layers.

        Raises
        ------
        NumericalError
            A gradient is NaN or infinite; names the layer.
        """
        if outputs:
            torch.autograd.backward(list(outputs), list(gradients))
        for source in list(self._pending):
            self._flush(source)
        for statistics in self.statistics.values():
            statistics.n_tokens += n_tokens

    def _receive(self, source: str, layer: Layer, counts: bool, module: nn.Module, args: tuple[Any, ...]) -> Any:
        inputs = args[0]
        if counts:
            self.statistics[source].add_inputs(inputs)
        self.statistics[source].layers[layer.name].n_tokens += inputs.numel() // inputs.shape[-1]
        if not inputs.requires_grad:  # the first block's, with frozen embeddings: its output must have a gradient too
            inputs = inputs.detach().requires_grad_()
        if self._weighted:
            call = self._calls[layer.name] = _Call(partial(self._pair, source))
            inputs = _Tap.apply(inputs, call)
        return (inputs, *args[1:])

    def _leave(self, source: str, layer: Layer, module: nn.Module, args: Any, output: Tensor) -> None:
        call = self._calls.pop(layer.name, None)
        if not output.requires_grad:
            return
        sensitivity = self.statistics[source].layers[layer.name]

        def hook(gradient: Tensor) -> None:
            weights = sensitivity.add(gradient)
            if call is not None:
                call.weights = weights

        output.register_hook(hook)

    def _pair(self, source: str, inputs: Tensor, weights: Tensor) -> None:
        """Take the weights that one layer's output gives to its input; sum them over the layers of equal input.

        Summing first saves products and nothing else: the weighted Gram is linear in the weights.
        """
        pending = self._pending.get(source)
        if pending is None or not pending.same(inputs):
            self._flush(source)
            pending = self._pending[source] = _Pending(inputs, torch.zeros_like(weights))
        pending.weights += weights
        pending.n_layers += 1
        if pending.n_layers == len(self._members[source]):
            self._flush(source)

    def _flush(self, source: str) -> None:
        pending = self._pending.pop(source, None)
        if pending is not None:
            self.statistics[source].add_weighted(pending.inputs, pending.weights)


class _Pending:
    """An input, kept alive so that its memory identifies it, and the weights that it has got so far."""

    def __init__(self, inputs: Tensor, weights: Tensor) -> None:
        self.inputs, self.weights, self.n_layers = inputs, weights, 0

    def same(self, inputs: Tensor) -> bool:
        ours = self.inputs
        return ours.data_ptr() == inputs.data_ptr() and ours.shape == inputs.shape and ours.stride() == inputs.stride()


class _Call:
    """One call of a layer: its output's gradient comes first and leaves the weights, then its input is reached."""

    def __init__(self, pair: Callable[[Tensor, Tensor], None]) -> None:
        self.weights: Tensor | None = None
        self._pair = pair

    def reach(self, inputs: Tensor) -> None:
        if self.weights is not None:
            self._pair(inputs, self.weights)
            self.weights = None


class _Tap(torch.autograd.Function):
    """Identity on a layer's input, which hands the input to the call when the backward pass arrives there."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: _Call) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.call = call
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.call.reach(ctx.saved_tensors[0])
        return gradients[0], None


@dataclass(frozen=True)
class LossGradients:
    """The loss whose gradients are collected, and what is summed of them.

    Attributes
    ----------
    labels : {"model", "text"}
        Drawn from the model's predictions (true Fisher information), or the text's next tokens (empirical Fisher,
        causal models only).
    seed : int
        Of the drawn labels.
    weighted : bool
        Also sum the Gram in which tokens count by their gradients; see ``SourceStatistics``.
    """

    labels: str = "model"
    seed: int = 0
    weighted: bool = False


def walk_statistics(
    model: WalkedModel,
    mapped: ModelMap,
    windows: Tensor,
    loss: LossGradients,
    *,
    batch_size: int = 8,
    first_window: int = 0,
    device: torch.device | str = "cpu",
    known: Container[str] = (),
    progress: Callable[[int, int, float, float], None] | None = None,
) -> Iterator[dict[str, SourceStatistics]]:
    """Run the model forwards and backwards over the calibration tokens and give statistics of its layers.

    The loss is the sum over all tokens of the cross-entropy of drawn labels or of the text's (see
    ``cospadi.calibration.labels``); a model without a head is taken to predict ``last_hidden_state`` as the mean of a
    Gaussian of unit variance.  The note of every result says which it was.

    All batches pass one block before any passes the next, forwards and then backwards: what is alive at a time are one
    block's weights, its sums, and what the blocks were given, which the cache holds.

    Parameters
    ----------
    model : WalkedModel
        A transformers model; runs in evaluation mode without gradients of its weights and is left as it was.  Its cache
        takes the activations between the blocks.
    mapped : ModelMap
        Its blocks, and the layers that are of interest.
    windows : Tensor, shape (n_windows, seq_len), int64
        Calibration tokens.
    loss : LossGradients
        What is collected.
    batch_size : int
        Windows per pass (fewer where their logits would take more than 128 MiB in float32).  Changes the result by
        rounding only.
    first_window : int
        Index of the first of these windows among all of the calibration; workers that share the windows give theirs,
        and their merged results are those of one worker.
    device : torch.device
        Where the sums are kept: that of the model.
    known : container of str
        Sources whose statistics are not wanted.
    progress : callable, optional
        Told how many steps are done and of how many, then how much of the work and of how much: a step is a block's
        way forwards or back, or the head.

    Yields
    ------
    dict of str to SourceStatistics
        Those of one block, from the last to the first, by the name of the first layer that receives the input.

    Raises
    ------
    UsageError
        Unknown labels, or ``text`` for a model that does not predict the next token.
    NumericalError
        An activation or gradient is NaN or infinite; names the layer.
    """
    if windows.ndim != 2 or windows.numel() == 0:
        raise UsageError(
            f"windows need a shape (n_windows, seq_len) with at least one token, got {tuple(windows.shape)}"
        )
    module: Any = model.module
    modules = dict(module.named_modules())
    batches = windows.split(min(batch_size, largest_batch(module, windows.shape[1])))
    starts = [first_window + sum(len(batch) for batch in batches[:i]) for i in range(len(batches))]
    blocks = [modules[name] for name in mapped.blocks]
    generates = bool(module.can_generate())
    chosen: Labels | None = None

    def loss_gradient(index: int, result: Any) -> tuple[Tensor, Tensor]:
        nonlocal chosen
        output, logits = model_output(result)
        if chosen is None:
            chosen = choose_labels(loss.labels, logits, generates, loss.seed)
        return output, chosen.gradient(output, batches[index], starts[index])

    choose_labels(loss.labels, True, generates, loss.seed)  # what cannot be is said before the work begins
    costs = _pass_costs(module, blocks, [la for la in mapped.layers if la.source not in known], 1 + loss.weighted)
    done, total, work = 0, len(costs), sum(costs)

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, sum(costs[:done]), work)

    with frozen(module), GradientPasses(blocks, model.call, batches, model.cache) as walk:
        for block in range(len(blocks)):
            walk.advance()
            if not walk.finite:
                layers = [layer for layer in mapped.layers if layer.block == block]
                with SensitivityCollector(
                    modules, layers, device=device
                ):  # refuses the first input that is not finite by its name
                    walk.back(block, lambda index, outputs, gradients: None)
                raise NumericalError(
                    f"{mapped.blocks[block]}: its output on the calibration text holds NaN or infinity"
                )
            tell()
        walk.turn(loss_gradient)
        assert chosen is not None
        tell()
        for block in reversed(range(len(blocks))):
            layers = [layer for layer in mapped.layers if layer.block == block and layer.source not in known]
            with SensitivityCollector(
                modules, layers, weighted=loss.weighted, note=chosen.note, device=device
            ) as collector:

                def backward(index: int, outputs: Any, gradients: Any, own: SensitivityCollector = collector) -> None:
                    own.backward(outputs, gradients, batches[index].numel())

                walk.back(block, backward)
            if collector.statistics:
                yield collector.statistics
            tell()


def _pass_costs(model: Any, blocks: Sequence[nn.Module], layers: Sequence[Layer], n_grams: int) -> list[float]:
    """Give what each step costs, in multiplications per token: all blocks, the head and its loss, all blocks back."""
    forth = [float(sum(p.numel() for p in block.parameters())) for block in blocks]
    # On the way back a block runs again, its inputs get gradients, and the Grams are summed.
    back = [2 * cost for cost in forth]
    for block, width in {layer.source: (layer.block, layer.in_features) for layer in layers}.values():
        back[block] += _PER_GRAM * n_grams * width**2
    head = model.get_output_embeddings()
    return [*forth, 0.0 if head is None else _PER_HEAD * head.weight.numel(), *reversed(back)]


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


def largest_batch(model: Any, seq_len: int) -> int:
    """Give how many windows' logits stay within bounds."""
    head = model.get_output_embeddings()
    vocabulary = 1 if head is None else head.weight.shape[0]
    return max(1, _MAX_LOGITS // (seq_len * vocabulary))
