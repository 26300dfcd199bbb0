"""Statistics of every distinct input of the layers, collected once and kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from cospadi.calibration import (
    ActivationCache,
    Gram,
    GramCollector,
    Lockstep,
    LossGradients,
    SourceStatistics,
    WalkedModel,
    forward_call,
    walk_statistics,
)
from cospadi.events import Calibrated
from cospadi.executors import Task, limited_threads
from cospadi.models import ModelMap, OpenModel
from cospadi.pipeline.group_inputs import opened
from cospadi.pipeline.job import Job
from cospadi.pipeline.statistics_store import Measurements


@dataclass(frozen=True)
class Part:
    """A share of the calibration windows, and what is collected on it.

    Attributes
    ----------
    windows : Tensor, shape (n_windows, seq_len), int64
    first_window : int
        Index of the first of them among all calibration windows.
    index, count : int
        Which part of how many.
    batch_size : int
        Windows per pass.
    loss : LossGradients or None
        Whose gradients are collected; None collects Grams alone.
    """

    windows: Tensor
    first_window: int
    index: int
    count: int
    batch_size: int
    loss: LossGradients | None


@dataclass(frozen=True)
class _Worker:
    """Where a worker in another process finds the model, keeps what it collects and spills activations."""

    model: Path
    map: ModelMap
    measurements: Path
    facts: dict[str, Any]
    activations: int | None
    scratch: Path


def calibrate(job: Job) -> None:
    """Collect the statistics of every input that is not measured yet.

    The windows are walked through in ``calibration.parts`` parts, which workers share; their sums are added up in
    order, so that the bytes do not depend on who collected them.
    """
    missing = [source for source in job.model.sources if source not in job.measurements]
    if not missing:
        return
    job.tell(Calibrated(0, 1, "block passes"))
    parts = _parts(job)
    if len(parts) == 1:
        _collect(job, parts[0], job.measurements)
        return
    folders = [_measurements_of(job.measurements, part) for part in parts]
    todo = [part for part in parts if any(source not in folders[part.index] for source in missing)]
    source, place = job.model.source, job.place
    if place.executor.n_workers == 1 or source.folder is None or not place.shared_storage:
        for part in todo:
            _collect(job, part, folders[part.index])
    else:
        tasks = []
        for part in todo:
            worker = _Worker(
                source.folder.absolute(),
                job.model.map,
                folders[part.index].folder.parent.absolute(),
                folders[part.index].facts,
                place.budget.activations,
                place.scratch / f"activations-{part.index}",
            )
            name = f"calibration, part {part.index + 1} of {part.count}"
            tasks.append(Task(name, float(len(part.windows)), partial(_collect_in_worker, worker, part)))
        for done, _ in enumerate(place.executor.run(tasks), start=1):
            job.tell(Calibrated(len(parts) - len(todo) + done, len(parts), "parts"))
    for name in missing:
        total = folders[0][name]
        for folder in folders[1:]:
            total.merge(folder[name])
        job.measurements.store(total)


def grams_by_block(
    source: OpenModel, mapped: ModelMap, windows: Tensor, batch_size: int, cache: ActivationCache | None = None
) -> Iterator[dict[str, Gram]]:
    """Give the Grams of each block's inputs, block by block."""
    with source.running() as model:
        modules = dict(model.named_modules())
        blocks = [modules[name] for name in mapped.blocks]
        call = forward_call(model, source.device)
        with Lockstep(blocks, call, windows.split(batch_size), cache) as walk:
            for block in range(len(blocks)):
                layers = {layer.source: layer for layer in mapped.layers if layer.block == block}
                watched = {name: modules[name] for name in layers}
                widths = {name: layer.in_features for name, layer in layers.items()}
                with GramCollector(watched, widths, source.device) as collector:
                    walk.advance()
                yield collector.statistics


def _parts(job: Job) -> list[Part]:
    """Divide the calibration windows as the recipe asks."""
    config, calibration = job.config, job.config.calibration
    loss = None
    if config.needs_sensitivities:
        loss = LossGradients(calibration.labels, config.seed, config.token_weights)
    parts: list[Part] = []
    first = 0
    for index, windows in enumerate(job.model.windows.tensor_split(calibration.parts)):
        parts.append(Part(windows, first, index, calibration.parts, calibration.batch_size, loss))
        first += len(windows)
    return parts


def _statistics(
    source: OpenModel,
    mapped: ModelMap,
    part: Part,
    known: Sequence[str],
    cache: ActivationCache,
    progress: Callable[[int, int, float, float], None] | None = None,
) -> Iterator[dict[str, SourceStatistics]]:
    """Walk through the model and give the statistics of one block after the other, without those that are known.

    The caller takes them out of the dict to free them before the next block's are collected.
    """
    if part.loss is not None:
        with source.running() as model:
            yield from walk_statistics(
                WalkedModel(model, forward_call(model, source.device), cache),
                mapped,
                part.windows,
                part.loss,
                batch_size=part.batch_size,
                first_window=part.first_window,
                device=source.device,
                known=known,
                progress=progress,
            )
        return
    n_tokens = part.windows.numel()
    for block, grams in enumerate(grams_by_block(source, mapped, part.windows, part.batch_size, cache)):
        yield {name: _plain(mapped, grams.pop(name), n_tokens) for name in list(grams) if name not in known}
        if progress is not None:
            progress(block + 1, len(mapped.blocks), block + 1, len(mapped.blocks))


def _plain(mapped: ModelMap, gram: Gram, n_tokens: int) -> SourceStatistics:
    widths = {layer.name: layer.out_features for layer in mapped.layers if layer.source == gram.name}
    statistics = SourceStatistics(gram.name, gram.matrix.shape[0], widths, grams=False)
    statistics.gram, statistics.n_tokens = gram, n_tokens
    return statistics


def _collect(job: Job, part: Part, into: Measurements) -> None:
    """Collect the statistics of a part in this process."""
    known = [source for source in job.model.sources if source in into]

    def progress(done: int, total: int, work_done: float, work_total: float) -> None:
        job.tell(
            Calibrated(
                part.index * total + done,
                part.count * total,
                "block passes",
                work_done=part.index * work_total + work_done,
                work_total=part.count * work_total,
            )
        )

    place = job.place
    with (
        limited_threads(place.executor.threads),
        ActivationCache(place.budget.activations, place.scratch / "activations") as cache,
    ):
        for found in _statistics(job.model.source, job.model.map, part, known, cache, progress):
            _store_all(found, into)


def _collect_in_worker(worker: _Worker, part: Part, device: str, inputs: None) -> None:
    """Collect the statistics of a part in a worker, which writes the records of its part itself."""
    into = Measurements(worker.measurements, worker.facts)
    known = [layer.source for layer in worker.map.layers if layer.source in into]
    source = opened(worker.model, device)
    with ActivationCache(worker.activations, worker.scratch) as cache:
        for found in _statistics(source, worker.map, part, known, cache):
            _store_all(found, into)


def _store_all(found: dict[str, SourceStatistics], into: Measurements) -> None:
    """Store statistics and free them, although the walk still holds the dict."""
    for source in list(found):
        into.store(found.pop(source))


def _measurements_of(measurements: Measurements, part: Part) -> Measurements:
    facts = {**measurements.facts, "part": f"{part.index + 1} of {part.count}"}
    return Measurements(measurements.folder.parent, facts)
