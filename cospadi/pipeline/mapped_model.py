"""A dense model, its linear layers, their groups and the calibration windows."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from cospadi.calibration import forward_call
from cospadi.models import Group, ModelMap, OpenModel, map_model


@dataclass(frozen=True)
class MappedModel:
    """A dense model as a run works on it.

    Attributes
    ----------
    source : OpenModel
        The dense model.
    map : ModelMap
        Its blocks and linear layers.
    groups : tuple of Group
        The layers by the dictionary that they share.
    windows : Tensor, shape (n_windows, seq_len), int64
        Calibration tokens.
    """

    source: OpenModel
    map: ModelMap
    groups: tuple[Group, ...]
    windows: Tensor

    @property
    def sources(self) -> list[str]:
        """The distinct inputs, each named after the first layer that receives it, in the order of the layers."""
        return list(dict.fromkeys(layer.source for layer in self.map.layers))

    @property
    def split_experts(self) -> list[str]:
        """The expert modules of which at least one layer is to be compressed."""
        return [
            name for name in self.source.experts if any(layer.name.startswith(f"{name}.") for layer in self.map.layers)
        ]


def find_layers(
    source: OpenModel, windows: Tensor, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()
) -> ModelMap:
    """Find the blocks and linear layers of a model by running it on a few tokens."""
    example = windows[:1, : min(8, windows.shape[1])]
    with source.running() as model:
        call: Callable[[Tensor], object] = forward_call(model, source.device)
        return map_model(model, lambda: call(example), include, exclude)
