"""Collectors: context managers that watch layers while a model runs and sum their inputs."""

import abc
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cospadi.calibration.gram import Gram

T = TypeVar("T")


class Collector(abc.ABC, Generic[T]):
    """Base of the collectors: a context manager that owns its hooks and removes them when it ends.

    Parameters
    ----------
    layers : mapping of str to Module
        The layers to watch.

    Attributes
    ----------
    statistics : dict of str to T
        What was collected, by layer name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = dict(layers)
        self.statistics: dict[str, T] = {}
        self._handles: list[RemovableHandle] = []

    @abc.abstractmethod
    def observe(self, name: str, inputs: Tensor) -> None:
        """Take in the inputs, shape (..., in_features), that a layer just received."""

    def __enter__(self) -> "Collector[T]":
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.observe(name, args[0])

        return hook


class GramCollector(Collector[Gram]):
    """Sums the Gram of each layer's inputs; a layer that never ran has a Gram of zero tokens.

    Parameters
    ----------
    layers : mapping of str to Module
        The layers to watch.
    in_features : mapping of str to int
        Their input widths.
    device : torch.device
        Where the sums are kept.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], in_features: Mapping[str, int], device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(layers)
        for name in layers:
            self.statistics[name] = Gram(name, in_features[name], device)

    def observe(self, name: str, inputs: Tensor) -> None:
        """Add the inputs to the layer's Gram."""
        self.statistics[name].add(inputs)
