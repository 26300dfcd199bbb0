"""Solve the units of a plan, each durably recorded when it is finished."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cospadi.calibration.cross import CrossGram
from cospadi.calibration.gradients import SourceStatistics
from cospadi.calibration.lockstep import forward_call
from cospadi.calibration.sequential import SequentialWalk
from cospadi.config import CompressionConfig
from cospadi.errors import UsageError
from cospadi.events import GroupFinished, Listener
from cospadi.factorize import Method, factorize_group
from cospadi.formats.packing import unpack_group
from cospadi.groups import Group
from cospadi.layers import ModelMap, weight_matrix
from cospadi.measurements import Measurements
from cospadi.models import OpenModel
from cospadi.objective import Objective, objective
from cospadi.planning import Unit
from cospadi.work import GroupRecord, WorkFolder


@dataclass(frozen=True)
class Job:
    """What a run works on; the same for a run and its resumption."""

    config: CompressionConfig
    method: Method
    reason: str
    source: OpenModel
    map: ModelMap
    groups: tuple[Group, ...]
    windows: Tensor
    call: Callable[[Any], Any]
    measurements: Measurements

    def objective(self, group: Group, weighted: bool, received: CrossGram | None = None) -> Objective:
        """Give a group's weights and metrics.

        Parameters
        ----------
        group : Group
        weighted : bool
            Whether errors are weighted by the sensitivities.
        received : CrossGram, optional
            What the layers receive behind those compressed before; else their inputs in the dense model count.
        """
        modules = dict(self.source.model.named_modules())
        weights = [weight_matrix(modules[layer.name]) for layer in group.layers]
        statistics: Mapping[str, SourceStatistics] = self.measurements
        if received is not None:
            there = copy.copy(self.measurements[group.layers[0].source])
            there.gram = received.gram
            statistics = {layer.source: there for layer in group.layers}
        return objective(
            group,
            weights,
            statistics,
            self.config.damping,
            column_weights=weighted,
            token_weights=self.config.token_weights and received is None,
            shift=None if received is None else received.shift,
            mixing=self.config.calibration.mixing,
            ridge=self.config.calibration.ridge,
        )


@dataclass
class _Progress:
    """Counts finished units and tells of them."""

    tell: Listener
    total: int
    done: int = 0

    def finish(self, record: GroupRecord, seconds: float, resumed: bool) -> None:
        self.done += 1
        self.tell(GroupFinished(record.row, self.done, self.total, seconds, resumed))


def solve(job: Job, units: Sequence[Unit], folder: WorkFolder, tell: Listener) -> dict[str, float]:
    """Solve whatever has no record yet; give the seconds that each unit took.

    Raises
    ------
    NumericalError
        NaN or infinity in a layer, which the text names; what was finished has its record.
    """
    progress, seconds = _Progress(tell, len(units)), dict[str, float]()
    if job.config.calibration.order == "sequential":
        _solve_sequentially(job, units, folder, progress, seconds)
        return seconds
    pending = []
    for index, unit in enumerate(units):
        record = folder.load(index)
        if record is None:
            pending.append((index, unit))
        else:
            progress.finish(record, 0.0, resumed=True)
    for index, unit in pending:
        _solve_unit(job, index, unit, folder, progress, seconds)
    return seconds


def check_order(config: CompressionConfig, groups: Sequence[Group]) -> None:
    """Refuse groups that sequential calibration cannot take in turn.

    Raises
    ------
    UsageError
        A group spans several blocks, or tokens are weighted.
    """
    if config.calibration.order != "sequential":
        return
    for group in groups:
        if not group.shared_input:
            raise UsageError(
                f"sequential calibration takes one input after the other: {group.name} shares a dictionary with layers "
                "of other inputs; choose groups none or natural"
            )
    if config.token_weights:
        raise UsageError("sequential calibration knows no token weights: switch off one of the two")


def _solve_sequentially(
    job: Job, units: Sequence[Unit], folder: WorkFolder, progress: _Progress, seconds: dict[str, float]
) -> None:
    """Walk through the model; every unit is solved on what the layers before it, as stored, now give."""
    device = job.source.model.device
    second = copy.deepcopy(job.source.model)
    batches = job.windows.split(job.config.calibration.batch_size)
    example = job.windows[:1, : min(8, job.windows.shape[1])]
    by_source: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        by_source.setdefault(unit.group.layers[0].source, []).append(index)
    reference = (job.source.model, job.call) if job.config.calibration.mixing > 0 else (None, None)
    walk = SequentialWalk(second, forward_call(second, device), job.map, batches, example, *reference)
    with walk:
        for step in walk:
            mine = [i for source in dict.fromkeys(la.source for la in step.layers) for i in by_source.get(source, [])]
            found = {index: folder.load(index) for index in mine}
            received = walk.collect() if any(record is None for record in found.values()) else {}
            for index in mine:
                record = found[index]
                if record is None:
                    cross = received[units[index].group.layers[0].source]
                    record = _solve_unit(job, index, units[index], folder, progress, seconds, cross)
                else:
                    progress.finish(record, 0.0, resumed=True)
                stored = unpack_group(record.spec, record.tensors)
                for layer in units[index].group.layers:
                    walk.replace(layer.name, stored.to_dense(layer.name))


def _solve_unit(
    job: Job,
    index: int,
    unit: Unit,
    folder: WorkFolder,
    progress: _Progress,
    seconds: dict[str, float],
    received: CrossGram | None = None,
) -> GroupRecord:
    start = time.perf_counter()
    group = unit.group
    modules = dict(job.source.model.named_modules())
    biases = {layer.name: modules[layer.name].get_parameter("bias") for layer in group.layers if layer.bias}
    if received is None:
        grams = {layer.source: _plain_gram(job.measurements[layer.source]) for layer in group.layers}
    else:
        grams = {layer.source: received.gram.matrix for layer in group.layers}
    target = job.objective(group, job.config.column_weights, received)
    record = factorize_group(group, unit.choice, target, grams, biases, job.method, unit.predicted)
    if received is not None and received.note:
        record.row["note"] = "; ".join(filter(None, [record.row["note"], received.note]))
    folder.store(index, record)
    seconds[group.name] = time.perf_counter() - start
    progress.finish(record, seconds[group.name], resumed=False)
    return record


def _plain_gram(statistics: SourceStatistics) -> Tensor:
    assert statistics.gram is not None
    return statistics.gram.matrix
