"""The job of a run: what it works on, and where."""

from dataclasses import dataclass
from pathlib import Path

import torch

from cospadi.allocation import Method
from cospadi.events import Listener
from cospadi.executors import Executor
from cospadi.pipeline.group_inputs import Reader
from cospadi.pipeline.mapped_model import MappedModel
from cospadi.pipeline.memory_plan import Budget
from cospadi.pipeline.statistics_store import Measurements
from cospadi.recipe import CompressionConfig


@dataclass(frozen=True)
class Workplace:
    """Where a run works: executor, memory, scratch folder.

    Attributes
    ----------
    executor : Executor
        Runs tasks that depend on no other.
    reader : callable
        Gives for a group the function that reads its inputs, wherever it runs.
    budget : Budget
        Of memory.
    scratch : Path
        Folder of this run alone, for what need not last.
    shared_storage : bool
        Whether workers see the folders of this machine.
    """

    executor: Executor
    reader: Reader
    budget: Budget
    scratch: Path
    shared_storage: bool


@dataclass(frozen=True)
class Job:
    """What a run works on; the same for a run and its resumption.

    Attributes
    ----------
    config : CompressionConfig
        The recipe.
    method : Method
        Solver, format and seed.
    reason : str
        Why this solver.
    model : MappedModel
        The dense model, its groups and the calibration windows.
    measurements : Measurements
        What calibration and profiling found, kept in a folder.
    place : Workplace
        Where the work is done.
    tell : callable
        Is told of events.
    """

    config: CompressionConfig
    method: Method
    reason: str
    model: MappedModel
    measurements: Measurements
    place: Workplace
    tell: Listener

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.source.device
