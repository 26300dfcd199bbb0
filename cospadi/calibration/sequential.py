"""Calibration behind a compressed prefix: block by block, and within a block one stage of layers after the other."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from cospadi.calibration.cross_gram import CrossGram
from cospadi.calibration.halting import BlockPasses
from cospadi.calibration.layer_order import find_stages
from cospadi.calibration.lockstep import WalkedModel
from cospadi.models import Layer, ModelMap, weight_matrix

ROUTED = "other tokens reach the layer than in the dense model: its own weight is the target"


@dataclass(frozen=True)
class Step:
    """Layers whose inputs are final: everything that they are computed from is replaced.

    Attributes
    ----------
    block : int
        Index of their block.
    layers : tuple of Layer
        In the order of the model; one or more sources.
    """

    block: int
    layers: tuple[Layer, ...]


class SequentialWalk:
    """Gives the layers of a model in the order in which they can be replaced, and what they then receive.

    Each batch waits at the entrance of the present block, once in the copy and once in the dense model.  A step runs
    the block from there as far as its layers; the passes themselves go on when the whole block has had its turn.
    So two hidden states per token are alive, and the model's own code decides what a block receives.

    Parameters
    ----------
    copy : WalkedModel
        The model whose layers are replaced; keeps the replaced weights.
    mapped : ModelMap
        Its blocks, and the layers to give; leave out those that stay as they are.
    batches : sequence
        Arguments of the models' calls.
    example : object
        A small batch, with which the order of the layers is found; best the one that made ``mapped``.
    dense : WalkedModel, optional
        The reference, a model of the same structure that shares no weight of ``mapped`` with the copy; left as it is.
        Without it the walk costs half and no shift is collected.
    enter : callable, optional
        Loads the weights of a block of the copy, given by name; called before the first step of the block.

    Attributes
    ----------
    steps : list of Step
        All steps, in order; known before the walk begins.

    Examples
    --------
    >>> with SequentialWalk(copy, mapped, batches, example, dense) as walk:
    ...     for step in walk:
    ...         statistics = walk.collect()
    ...         for layer in step.layers:
    ...             walk.replace(layer.name, compress(layer, statistics[layer.source]))
    """

    def __init__(
        self,
        copy: WalkedModel,
        mapped: ModelMap,
        batches: Sequence[Any],
        example: Any,
        dense: WalkedModel | None = None,
        enter: Callable[[str], None] | None = None,
    ) -> None:
        if dense is not None:
            _check_apart(copy.module, dense.module, mapped.layers)
        self._blocks = {layer.name: layer.block for layer in mapped.layers}
        stages = find_stages(copy.module, mapped, lambda: copy.call(example))
        self.steps = [Step(block, layers) for block, inner in enumerate(stages) for layers in inner]
        # The blocks after the last one of interest need not run.
        names = mapped.blocks[: 1 + max(layer.block for layer in mapped.layers)]
        self._enter = enter
        self._names = names
        self._copy = BlockPasses(copy.module, names, copy.call, batches, copy.cache)
        self._dense = None if dense is None else BlockPasses(dense.module, names, dense.call, batches, dense.cache)
        self._n_batches = len(batches)
        self._open = self._begun = self._stale = False
        self._step: Step | None = None
        self._stack = ExitStack()

    def __enter__(self) -> "SequentialWalk":
        with ExitStack() as stack:
            stack.enter_context(self._copy)
            if self._dense is not None:
                stack.enter_context(self._dense)
            self._stack = stack.pop_all()
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open, self._step = False, None
        self._stack.close()

    def __iter__(self) -> Iterator[Step]:
        """Give the steps; a walk can be iterated once."""
        if self._begun or not self._open:
            raise ValueError("iterate over the walk inside its context, and once: make another")
        self._begun = True
        block = 0
        for step in self.steps:
            while block < step.block:
                if self._stale:
                    self._copy.restart(block + 1)
                    self._stale = False
                else:
                    self._copy.advance()
                if self._dense is not None:
                    self._dense.advance()
                block += 1
            if self._enter is not None:
                self._enter(self._names[block])
            self._step = step
            yield step
        self._step = None

    def collect(self) -> dict[str, CrossGram]:
        """Give the statistics of the present step by source, with all weights replaced so far; changes nothing.

        Not calling it, when a step's weights are known already, saves its forward passes.

        Raises
        ------
        NumericalError
            The inputs of a layer hold NaN or infinity; the text names the layer.
        """
        step = self._present()
        widths = {layer.source: layer.in_features for layer in step.layers}
        result = {name: CrossGram(name, width, self._copy.device) for name, width in widths.items()}
        for index in range(self._n_batches):
            n_tokens, received = self._copy.inputs(step.block, index, list(widths))
            reference = {} if self._dense is None else self._dense.inputs(step.block, index, list(widths))[1]
            for name, statistic in result.items():
                inputs, dense = received.get(name), reference.get(name)
                if self._dense is not None and not (_whole(inputs, n_tokens) and _whole(dense, n_tokens)):
                    statistic.give_up(ROUTED)
                if inputs is not None:
                    statistic.add(inputs, dense)
        return result

    def replace(self, name: str, weight: Tensor) -> None:
        """Overwrite the weight of a layer of the present block or of an earlier one.

        The next steps of the block see it at once.  A layer of an earlier block (its group had to wait for later
        blocks) is seen from the next block on, for which the copy runs once more from the start.

        Parameters
        ----------
        name : str
            The layer.
        weight : Tensor, shape (in_features, out_features)
            What the checkpoint will hold; rounded to the dtype of the copy.

        Raises
        ------
        ValueError
            The layer is unknown or in a later block, or the shape is another.
        """
        present = self._present().block
        block = self._blocks.get(name, present + 1)
        if block > present:
            raise ValueError(f"{name} cannot be replaced now: it is no layer of the blocks up to {present}")
        target = self._copy.weight(name)
        if weight.shape != target.shape:
            raise ValueError(f"{name}: the weight has shape {tuple(target.shape)}, not {tuple(weight.shape)}")
        if target.is_meta:
            raise ValueError(f"{name} is not in memory: its block is to be entered first")
        target.copy_(weight)
        self._stale = self._stale or block < present

    def _present(self) -> Step:
        if self._step is None:
            raise ValueError("the walk is at no step: iterate over it inside its context")
        return self._step


def _whole(inputs: Tensor | None, n_tokens: int) -> bool:
    """Tell whether a layer received all tokens, in which case the rows of two models correspond."""
    return inputs is not None and inputs.numel() == n_tokens * inputs.shape[-1]


def _check_apart(copy: nn.Module, dense: nn.Module, layers: Sequence[Layer]) -> None:
    """Refuse a reference of another structure, or one that would change with the copy."""
    modules = dict(dense.named_modules())
    for layer in layers:
        own = weight_matrix(copy.get_submodule(layer.name))
        other = weight_matrix(modules[layer.name]) if layer.name in modules else None
        if other is None or other.shape != own.shape:
            raise ValueError(f"the dense model has no layer {layer.name} of shape {tuple(own.shape)}")
        if not own.is_meta and other.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            raise ValueError(f"{layer.name}: the copy shares its weight with the dense model: make a deep copy")
