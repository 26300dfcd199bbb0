"""Solve the units of a plan, each durably recorded when it is finished."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cospadi.allocation import Method, Unit
from cospadi.calibration import ActivationCache, CrossGram, SequentialWalk, SourceStatistics, forward_call
from cospadi.errors import UsageError
from cospadi.events import GroupFinished, Listener
from cospadi.executors import Task, limited_threads
from cospadi.formats import unpack_group
from cospadi.models import Group
from cospadi.pipeline import workload as costs
from cospadi.pipeline.approximate import factorize_group
from cospadi.pipeline.group_inputs import GroupInputs
from cospadi.pipeline.job import Job
from cospadi.pipeline.records import GroupRecord
from cospadi.pipeline.work_folder import WorkFolder
from cospadi.recipe import CompressionConfig


@dataclass
class _Progress:
    """Counts finished units and tells of them."""

    tell: Listener
    costs: list[float]
    done: int = 0
    work: float = 0.0

    def finish(self, index: int, row: dict[str, Any], seconds: float, resumed: bool) -> None:
        self.done += 1
        self.work += self.costs[index]
        total = sum(self.costs)
        self.tell(
            GroupFinished(row, self.done, len(self.costs), seconds, resumed, work_done=self.work, work_total=total)
        )


def solve(job: Job, units: Sequence[Unit], folder: WorkFolder) -> dict[str, float]:
    """Solve whatever has no record yet; give the seconds that each unit took.

    Raises
    ------
    NumericalError
        NaN or infinity in a layer, which the text names; what was finished has its record.
    """
    progress, seconds = _Progress(job.tell, [cost_of(job.method, unit) for unit in units]), dict[str, float]()
    if job.config.calibration.order == "sequential":
        with limited_threads(job.executor.threads):
            _solve_sequentially(job, units, folder, progress, seconds)
        return seconds
    pending = []
    for index in range(len(units)):
        row = folder.row(index) if folder.has(index) else None
        if row is None:
            pending.append(index)
        else:
            progress.finish(index, row, 0.0, resumed=True)
    tasks = [
        Task(
            units[index].group.name,
            progress.costs[index],
            partial(_solve_unit, job.config, job.method, units[index]),
            job.reader(units[index].group),
        )
        for index in pending
    ]
    for number, (record, took) in job.executor.run(tasks):
        index = pending[number]
        folder.store(index, record)
        seconds[units[index].group.name] = took
        progress.finish(index, record.row, took, resumed=False)
    return seconds


def cost_of(method: Method, unit: Unit) -> float:
    """Give what solving a unit costs against others."""
    group = unit.group
    n_inputs = len({layer.source for layer in group.layers})
    return costs.solving(unit.choice, group.in_features, group.out_features, method.solver, n_inputs)


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
    batches = job.windows.split(job.config.calibration.batch_size)
    example = job.windows[:1, : min(8, job.windows.shape[1])]
    by_source: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        by_source.setdefault(unit.group.layers[0].source, []).append(index)
    mixing = job.config.calibration.mixing > 0
    limit = job.budget.activations
    shares = None if limit is None else limit // (2 if mixing else 1)
    with ExitStack() as stack:
        second, enter = stack.enter_context(job.source.twin())
        caches = [stack.enter_context(ActivationCache(shares, folder.folder / name)) for name in ("copy", "dense")]
        reference: tuple[Any, Any] = (None, None)
        if mixing:
            dense = stack.enter_context(job.source.running())
            reference = (dense, forward_call(dense, job.device))
        call = forward_call(second, job.device)
        walk = SequentialWalk(
            second, call, job.map, batches, example, *reference, enter=enter, caches=(caches[0], caches[1])
        )
        stack.enter_context(walk)
        for step in walk:
            mine = [i for source in dict.fromkeys(la.source for la in step.layers) for i in by_source.get(source, [])]
            _solve_step(job, units, mine, folder, walk, progress, seconds)


def _solve_step(
    job: Job,
    units: Sequence[Unit],
    mine: Sequence[int],
    folder: WorkFolder,
    walk: SequentialWalk,
    progress: _Progress,
    seconds: dict[str, float],
) -> None:
    """Solve the units of one step of the walk, as far as they have no record, and replace their layers."""
    found = {index: folder.load(index) for index in mine}
    received = walk.collect() if any(record is None for record in found.values()) else {}
    for index in mine:
        record, unit = found[index], units[index]
        if record is None:
            cross = received[unit.group.layers[0].source]
            record, took = _solve_unit(
                job.config, job.method, unit, job.device, job.reader(unit.group)(), received=cross
            )
            folder.store(index, record)
            seconds[unit.group.name] = took
            progress.finish(index, record.row, took, resumed=False)
        else:
            progress.finish(index, record.row, 0.0, resumed=True)
        stored = unpack_group(record.spec, record.tensors)
        for layer in unit.group.layers:
            walk.replace(layer.name, stored.to_dense(layer.name))


def _solve_unit(
    config: CompressionConfig,
    method: Method,
    unit: Unit,
    device: str | torch.device,
    inputs: GroupInputs,
    received: CrossGram | None = None,
) -> tuple[GroupRecord, float]:
    """Give the record of a unit and the seconds that it took, wherever this runs."""
    start = time.perf_counter()
    group, inputs = unit.group, inputs.to(device)
    if received is None:
        grams = {source: _plain_gram(statistics) for source, statistics in inputs.statistics.items()}
    else:
        grams = {layer.source: received.gram.matrix for layer in group.layers}
    target = inputs.objective(config, group, config.column_weights, received)
    record = factorize_group(group, unit.choice, target, grams, inputs.biases, method, unit.predicted)
    if received is not None and received.note:
        record.row["note"] = "; ".join(filter(None, [record.row["note"], received.note]))
    return record, time.perf_counter() - start


def _plain_gram(statistics: SourceStatistics) -> Tensor:
    assert statistics.gram is not None
    return statistics.gram.matrix
