"""One backward pass over the calibration tokens: which outputs of which layers the model's loss depends on."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cospadi.calibration.gradients import SourceStatistics
from cospadi.calibration.labels import choose_labels, model_output
from cospadi.calibration.recomputation import checkpointed, frozen
from cospadi.errors import UsageError
from cospadi.layers import Layer, ModelMap

_MAX_LOGITS = 1 << 27
"""Logits of one batch (512 MiB in float32); a larger batch is divided, which changes the result by rounding only."""


class SensitivityCollector:
    """Sums what the backward pass brings to each layer; a context manager that owns its hooks.

    Inputs that the weighted Gram needs are saved through autograd, so that with activation checkpointing they are
    recomputed with the rest of their block and not kept.

    Parameters
    ----------
    modules : mapping of str to Module
        The linear layers, by name; their weights need no gradient.
    layers : sequence of Layer
        What to know about them; layers of one source are taken together.
    grams, weighted, output_grams : bool
        Which sums to keep beside the squares; see ``SourceStatistics``.
    note : str
        How the loss is defined.

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
        grams: bool = True,
        weighted: bool = False,
        output_grams: bool = False,
        note: str = "",
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
                grams=grams,
                weighted=weighted,
                output_grams=output_grams,
                device=modules[members[0].name].get_parameter("weight").device,
                note=note,
            )
            for source, members in self._members.items()
        }
        self._handles: list[RemovableHandle] = []
        self._recomputing = False
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

    def backward(self, output: Tensor, gradient: Tensor, n_tokens: int) -> None:
        """Run the backward pass of one batch from the gradient at the model's output.

        Raises
        ------
        NumericalError
            A gradient is NaN or infinite; names the layer.
        """
        self._recomputing = True
        try:
            torch.autograd.backward([output], [gradient])
        finally:
            self._recomputing = False
        for source in list(self._pending):
            self._flush(source)
        for statistics in self.statistics.values():
            statistics.n_tokens += n_tokens

    def _receive(self, source: str, layer: Layer, counts: bool, module: nn.Module, args: tuple[Any, ...]) -> Any:
        inputs = args[0]
        if not self._recomputing:
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
        if self._recomputing or not output.requires_grad:
            return  # gradients flow through the first pass's graph; the recomputed one only supplies saved tensors
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


def collect_statistics(
    model: Any,
    mapped: ModelMap,
    call: Callable[[Tensor], Any],
    windows: Tensor,
    *,
    batch_size: int = 8,
    labels: str = "model",
    seed: int = 0,
    first_window: int = 0,
    grams: bool = True,
    weighted: bool = False,
    output_grams: bool = False,
    recompute: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SourceStatistics]:
    """Run the model forwards and backwards over the calibration tokens and collect statistics of its layers.

    The loss is the sum over all tokens of the cross-entropy of drawn labels or of the text's (see
    ``cospadi.calibration.labels``); a model without a head is taken to predict ``last_hidden_state`` as the mean of a
    Gaussian of unit variance.  The note of every result says which it was.

    Between the blocks only their inputs are kept, and each block is recomputed when the backward pass reaches it
    (Chen et al. 2016, arXiv 1604.06174).  The sums of all layers of ``mapped`` are held at the same time: for a large
    model leave the Grams out, or pass a map of some of its layers at a time.

    Parameters
    ----------
    model : PreTrainedModel
        Runs in evaluation mode without gradients of its weights; left as it was.
    mapped : ModelMap
        Its blocks, and the layers that are of interest.
    call : callable
        Runs the model on windows, see ``forward_call``.
    windows : Tensor, shape (n_windows, seq_len), int64
        Calibration tokens.
    batch_size : int
        Windows per pass (fewer where their logits would take more than 512 MiB in float32).  Changes the result by
        rounding only.
    labels : str
        ``model`` (true Fisher information) or ``text`` (empirical Fisher, causal models only).
    seed : int
        Of the drawn labels.
    first_window : int
        Index of the first of these windows among all of the calibration; workers that share the windows give theirs,
        and their merged results are those of one worker.
    grams, weighted, output_grams : bool
        Which sums to keep beside the squares; see ``SourceStatistics``.
    recompute : bool
        False keeps the activations of all blocks: more memory, a third less work, the same result.
    progress : callable, optional
        Told the number of windows done and of all.

    Returns
    -------
    dict of str to SourceStatistics
        By the name of the first layer that receives the input, as ``collect_grams``.

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
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in mapped.blocks] if recompute else []
    size = min(batch_size, _largest_batch(model, windows.shape[1]))
    with frozen(model), checkpointed(blocks), torch.enable_grad():
        with torch.no_grad():
            _, logits = model_output(call(windows[:1, :1]))
        chosen = choose_labels(labels, logits, bool(model.can_generate()), seed)
        with SensitivityCollector(
            modules, mapped.layers, grams=grams, weighted=weighted, output_grams=output_grams, note=chosen.note
        ) as collector:
            for start in range(0, len(windows), size):
                batch = windows[start : start + size]
                output, _ = model_output(call(batch))
                collector.backward(output, chosen.gradient(output, batch, first_window + start), batch.numel())
                if progress is not None:
                    progress(start + len(batch), len(windows))
    return collector.statistics


def _largest_batch(model: Any, seq_len: int) -> int:
    """Give how many windows' logits stay within bounds."""
    head = model.get_output_embeddings()
    vocabulary = 1 if head is None else head.weight.shape[0]
    return max(1, _MAX_LOGITS // (seq_len * vocabulary))
