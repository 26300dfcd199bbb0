"""What solving a group needs, and how it reaches the process that solves it."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cospadi.calibration import CrossGram, SourceStatistics
from cospadi.models import Group, OpenModel, open_model
from cospadi.pipeline.statistics_store import Measurements
from cospadi.recipe import CompressionConfig
from cospadi.whitening import Objective, build_objective


@dataclass(frozen=True)
class GroupInputs:
    """Weights of a group's layers and statistics of their inputs.

    Attributes
    ----------
    weights : dict of str to Tensor, shape (in_features, out_features)
        W by layer.
    biases : dict of str to Tensor
        By layer, of those that have one.
    statistics : dict of str to SourceStatistics
        By source.
    """

    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    statistics: dict[str, SourceStatistics]

    def to(self, device: str | torch.device) -> "GroupInputs":
        """Give the same on a device."""
        return GroupInputs(
            {name: weight.to(device) for name, weight in self.weights.items()},
            {name: bias.to(device) for name, bias in self.biases.items()},
            {name: statistics.to(device) for name, statistics in self.statistics.items()},
        )

    def objective(
        self, config: CompressionConfig, group: Group, weighted: bool, received: CrossGram | None = None
    ) -> Objective:
        """Give the group's weights and metrics.

        Parameters
        ----------
        config : CompressionConfig
        group : Group
        weighted : bool
            Whether errors are weighted by the sensitivities.
        received : CrossGram, optional
            What the layers receive behind those compressed before; else their inputs in the dense model count.
        """
        statistics: Mapping[str, SourceStatistics] = self.statistics
        if received is not None:
            there = copy.copy(statistics[group.layers[0].source])
            there.gram = received.gram
            statistics = {layer.source: there for layer in group.layers}
        return build_objective(
            group,
            [self.weights[layer.name] for layer in group.layers],
            statistics,
            config.damping,
            column_weights=weighted,
            token_weights=config.token_weights and received is None,
            shift=None if received is None else received.shift,
            mixing=config.calibration.mixing,
            ridge=config.calibration.ridge,
        )


Reader = Callable[[Group], Callable[[], GroupInputs]]
"""Gives for a group what reads its inputs."""


def read_inputs(source: OpenModel, statistics: Mapping[str, SourceStatistics], group: Group) -> GroupInputs:
    """Read what solving a group needs."""
    return GroupInputs(
        {layer.name: source.matrix(layer.name) for layer in group.layers},
        {layer.name: source.bias(layer.name) for layer in group.layers if layer.bias},
        {layer.source: statistics[layer.source] for layer in group.layers},
    )


def reader_of(source: OpenModel, measurements: Measurements, *, shared: bool) -> Reader:
    """Give what reads the inputs of groups: of this process's model, or in workers."""
    if shared:
        return SharedFolders.of(source, measurements).reader
    return lambda group: partial(read_inputs, source, measurements, group)


@dataclass(frozen=True)
class SharedFolders:
    """Where a worker in another process or on another machine finds the model and its measurements.

    Attributes
    ----------
    model : Path
        Folder of the dense model.
    measurements : Path
        Of all measurements.
    facts : str
        JSON of those that tell which ones.
    """

    model: Path
    measurements: Path
    facts: str

    @classmethod
    def of(cls, source: OpenModel, measurements: Measurements) -> "SharedFolders":
        """Give the folders of a model and its measurements."""
        assert source.folder is not None
        facts = json.dumps(measurements.facts, sort_keys=True)
        return cls(source.folder.absolute(), measurements.folder.parent.absolute(), facts)

    def reader(self, group: Group) -> Callable[[], GroupInputs]:
        """Give what reads a group's inputs, wherever it runs."""
        return partial(_read_shared, self, group)


@lru_cache(maxsize=1)
def opened(folder: Path, device: str = "cpu") -> OpenModel:
    """Open a model once in a worker process."""
    return open_model(folder, torch.device(device), _NO_TOKENIZER, streamed=True, split=True)


@lru_cache(maxsize=1)
def _measured(root: Path, facts: str) -> Measurements:
    return Measurements(root, json.loads(facts))


def _read_shared(folders: SharedFolders, group: Group) -> GroupInputs:
    return read_inputs(opened(folders.model), _measured(folders.measurements, folders.facts), group)


_NO_TOKENIZER: Any = object()
"""Stands for a tokenizer that a worker does not need."""
