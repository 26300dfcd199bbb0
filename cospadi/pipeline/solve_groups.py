"""Solve the groups of a plan, each durably recorded when it is finished."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from cospadi.allocation import GroupPlan, Method
from cospadi.calibration import ActivationCache, CrossGram, SequentialWalk, SourceStatistics, WalkedModel, forward_call
from cospadi.events import GroupFinished
from cospadi.executors import Task, limited_threads
from cospadi.formats import unpack_group
from cospadi.pipeline import workload
from cospadi.pipeline.approximate import factorize_group
from cospadi.pipeline.group_inputs import GroupInputs
from cospadi.pipeline.job import Job
from cospadi.pipeline.records import GroupRecord, Records
from cospadi.recipe import CompressionConfig
from cospadi.reporting import GroupRow


def solve_groups(job: Job, plans: Sequence[GroupPlan], records: Records) -> dict[str, float]:
    """Solve every group that has no record yet; give the seconds that each took, by name.

    Raises
    ------
    NumericalError
        NaN or infinity in a layer, which the text names; the groups that were finished keep their records.
    """
    run = _Solving(job, plans, records)
    if job.config.calibration.order == "sequential":
        with limited_threads(job.place.executor.threads):
            run.one_behind_the_other()
    else:
        run.in_any_order()
    return run.seconds


class _Solving:
    """The groups of a plan on their way to records, and how far they are."""

    def __init__(self, job: Job, plans: Sequence[GroupPlan], records: Records) -> None:
        self.job, self.plans, self.records = job, plans, records
        self.costs = [workload.of_plan(job.method, plan) for plan in plans]
        self.done, self.work = 0, 0.0
        self.seconds: dict[str, float] = {}

    def in_any_order(self) -> None:
        """Solve each group on the inputs of the dense model, by the executor."""
        pending = []
        for index in range(len(self.plans)):
            row = self.records.row(index) if self.records.has(index) else None
            if row is None:
                pending.append(index)
            else:
                self._tell(index, row, 0.0, resumed=True)
        tasks = [
            Task(
                self.plans[index].group.name,
                self.costs[index],
                partial(_solve_group, self.job.config, self.job.method, self.plans[index]),
                self.job.place.reader(self.plans[index].group),
            )
            for index in pending
        ]
        for number, (record, seconds) in self.job.place.executor.run(tasks):
            self._keep(pending[number], record, seconds)

    def one_behind_the_other(self) -> None:
        """Walk through the model; each group is solved on what the layers before it, as stored, now give."""
        job, windows = self.job, self.job.model.windows
        by_source: dict[str, list[int]] = {}
        for index, plan in enumerate(self.plans):
            by_source.setdefault(plan.group.layers[0].source, []).append(index)
        mixing = job.config.calibration.mixing > 0
        limit = job.place.budget.activations
        share = None if limit is None else limit // (2 if mixing else 1)
        with ExitStack() as stack:
            second, enter = stack.enter_context(job.model.source.twin())
            caches = [stack.enter_context(ActivationCache(share, self.records.folder / n)) for n in ("copy", "dense")]
            dense = None
            if mixing:
                running = stack.enter_context(job.model.source.running())
                dense = WalkedModel(running, forward_call(running, job.device), caches[1])
            copy = WalkedModel(second, forward_call(second, job.device), caches[0])
            batches = windows.split(job.config.calibration.batch_size)
            walk = SequentialWalk(copy, job.model.map, batches, windows[:1, :8], dense, enter)
            stack.enter_context(walk)
            for step in walk:
                sources = dict.fromkeys(layer.source for layer in step.layers)
                self._step(walk, [index for source in sources for index in by_source.get(source, [])])

    def _step(self, walk: SequentialWalk, indices: Sequence[int]) -> None:
        """Solve the groups of one step of the walk that have no record, and put all of them into the model."""
        found = {index: self.records.load(index) for index in indices}
        received = walk.collect() if any(record is None for record in found.values()) else {}
        for index, record in found.items():
            group = self.plans[index].group
            if record is None:
                inputs = self.job.place.reader(group)()
                cross = received[group.layers[0].source]
                job = self.job
                record, seconds = _solve_group(job.config, job.method, self.plans[index], job.device, inputs, cross)
                self._keep(index, record, seconds)
            else:
                self._tell(index, record.row, 0.0, resumed=True)
            stored = unpack_group(record.spec, record.tensors)
            for layer in group.layers:
                walk.replace(layer.name, stored.to_dense(layer.name))

    def _keep(self, index: int, record: GroupRecord, seconds: float) -> None:
        self.records.store(index, record)
        self.seconds[self.plans[index].group.name] = seconds
        self._tell(index, record.row, seconds, resumed=False)

    def _tell(self, index: int, row: GroupRow, seconds: float, resumed: bool) -> None:
        self.done += 1
        self.work += self.costs[index]
        total = sum(self.costs)
        self.job.tell(
            GroupFinished(
                dict(row), self.done, len(self.costs), seconds, resumed, work_done=self.work, work_total=total
            )
        )


def _solve_group(
    config: CompressionConfig,
    method: Method,
    plan: GroupPlan,
    device: str | torch.device,
    inputs: GroupInputs,
    received: CrossGram | None = None,
) -> tuple[GroupRecord, float]:
    """Give the record of a group and the seconds that it took, wherever this runs."""
    start = time.perf_counter()
    group, inputs = plan.group, inputs.to(device)
    if received is None:
        grams = {source: _plain_gram(statistics) for source, statistics in inputs.statistics.items()}
    else:
        grams = {layer.source: received.gram.matrix for layer in group.layers}
    objective = inputs.objective(config, group, config.column_weights, received)
    record = factorize_group(plan, objective, grams, inputs.biases, method)
    if received is not None and received.note:
        record.row["note"] = "; ".join(filter(None, [record.row["note"], received.note]))
    return record, time.perf_counter() - start


def _plain_gram(statistics: SourceStatistics) -> Tensor:
    assert statistics.gram is not None
    return statistics.gram.matrix
