"""What a run works on."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cospadi.allocation import Method
from cospadi.events import Listener
from cospadi.executors import Executor
from cospadi.models import Group, ModelMap, OpenModel
from cospadi.pipeline.group_inputs import Reader
from cospadi.pipeline.memory_plan import Budget
from cospadi.pipeline.statistics_store import Measurements
from cospadi.recipe import CompressionConfig


@dataclass(frozen=True)
class Job:
    """What a run works on; the same for a run and its resumption.

    Attributes
    ----------
    config : CompressionConfig
    method : Method
        Solver, format and seed; ``reason`` says why this solver.
    reason : str
    source : OpenModel
        The dense model.
    map : ModelMap
    groups : tuple of Group
    windows : Tensor, shape (n_windows, seq_len), int64
        Calibration tokens.
    measurements : Measurements
        What calibration and profiling found.
    executor : Executor
        Runs what can run side by side.
    reader : callable
        Gives for a group what reads its inputs.
    budget : Budget
        Of memory.
    scratch : Path
        Folder of this run alone, for what need not last.
    tell : callable
        Is told of events.
    shared_storage : bool
        Whether workers see the folders of this machine.
    """

    config: CompressionConfig
    method: Method
    reason: str
    source: OpenModel
    map: ModelMap
    groups: tuple[Group, ...]
    windows: Tensor
    measurements: Measurements
    executor: Executor
    reader: Reader
    budget: Budget
    scratch: Path
    tell: Listener
    shared_storage: bool = True

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.source.device

    @property
    def sensitive(self) -> bool:
        """Whether the recipe needs sensitivities."""
        return is_sensitive(self.config)


def is_sensitive(config: CompressionConfig) -> bool:
    """Tell whether a recipe needs sensitivities."""
    return config.column_weights or config.token_weights or cost_is_sensitivity(config)


def cost_is_sensitivity(config: CompressionConfig) -> bool:
    """Tell whether the allocation adds up the loss's gain."""
    return config.allocation != "uniform" and config.cost == "sensitivity"
