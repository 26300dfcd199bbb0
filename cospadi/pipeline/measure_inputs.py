"""Calibration: the statistics of every distinct input, measured once and kept."""

from collections.abc import Iterator, Sequence
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
    SourceStatistics,
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
class Wanted:
    """What is to be measured, and how.

    Attributes
    ----------
    batch_size : int
        Windows per pass.
    labels : str or None
        Of the loss whose gradients are collected; None collects Grams alone.
    seed : int
        Of the labels.
    weighted : bool
        Also the Grams in which tokens count by their gradients.
    """

    batch_size: int
    labels: str | None
    seed: int
    weighted: bool


def calibrate(job: Job) -> None:
    """Collect the statistics of every input that is not measured yet.

    The windows are walked through in ``calibration.parts`` parts, which workers share; their sums are added up in
    order, so that the bytes do not depend on who collected them.
    """
    sources = {layer.source: layer for layer in job.map.layers}
    missing = [source for source in sources if source not in job.measurements]
    if not missing:
        return
    job.tell(Calibrated(0, 1, "block passes"))
    calibration = job.config.calibration
    wanted = Wanted(
        calibration.batch_size,
        calibration.labels if job.sensitive else None,
        job.config.seed,
        job.config.token_weights,
    )
    parts = job.windows.tensor_split(calibration.parts)
    if len(parts) == 1:
        with limited_threads(job.executor.threads):
            _collect(job, parts[0], 0, wanted, job.measurements, 0, 1)
        return
    folders = [_part_of(job.measurements, index, len(parts)) for index in range(len(parts))]
    starts = [sum(len(part) for part in parts[:index]) for index in range(len(parts))]
    todo = [index for index in range(len(parts)) if any(source not in folders[index] for source in missing)]
    if job.executor.n_workers == 1 or job.source.folder is None or not job.shared_storage:
        for index in todo:
            with limited_threads(job.executor.threads):
                _collect(job, parts[index], starts[index], wanted, folders[index], index, len(parts))
    else:
        limit = job.budget.activations
        tasks = [
            Task(
                f"calibration, part {index + 1} of {len(parts)}",
                float(len(parts[index])),
                partial(
                    _collect_part,
                    job.source.folder.absolute(),
                    job.map,
                    parts[index],
                    starts[index],
                    wanted,
                    (folders[index].folder.parent.absolute(), folders[index].facts),
                    limit,
                    job.scratch / f"activations-{index}",
                ),
            )
            for index in todo
        ]
        for done, _ in enumerate(job.executor.run(tasks), start=1):
            job.tell(Calibrated(len(parts) - len(todo) + done, len(parts), "parts"))
    for source in missing:
        total = folders[0][source]
        for folder in folders[1:]:
            total.merge(folder[source])
        job.measurements.store(total)


def collect_grams(
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


def statistics_of(
    source: OpenModel,
    mapped: ModelMap,
    windows: Tensor,
    first_window: int,
    wanted: Wanted,
    known: Sequence[str],
    cache: ActivationCache,
    progress: Any = None,
) -> Iterator[dict[str, SourceStatistics]]:
    """Walk through the model and give the statistics of one block after the other, without those that are known.

    Who takes them out of the dict frees them; else they stay in memory while the next block's are collected.
    """
    if wanted.labels is not None:
        with source.running() as model:
            yield from walk_statistics(
                model,
                mapped,
                forward_call(model, source.device),
                windows,
                batch_size=wanted.batch_size,
                labels=wanted.labels,
                seed=wanted.seed,
                first_window=first_window,
                weighted=wanted.weighted,
                device=source.device,
                cache=cache,
                known=known,
                progress=progress,
            )
        return
    for block, grams in enumerate(collect_grams(source, mapped, windows, wanted.batch_size, cache)):
        yield {name: _plain(mapped, grams.pop(name), windows.numel()) for name in list(grams) if name not in known}
        if progress is not None:
            progress(block + 1, len(mapped.blocks), block + 1, len(mapped.blocks))


def _plain(mapped: ModelMap, gram: Gram, n_tokens: int) -> SourceStatistics:
    widths = {layer.name: layer.out_features for layer in mapped.layers if layer.source == gram.name}
    statistics = SourceStatistics(gram.name, gram.matrix.shape[0], widths, grams=False)
    statistics.gram, statistics.n_tokens = gram, n_tokens
    return statistics


def _collect(
    job: Job, windows: Tensor, first: int, wanted: Wanted, into: Measurements, part: int, n_parts: int
) -> None:
    known = [layer.source for layer in job.map.layers if layer.source in into]

    def progress(done: int, total: int, work_done: float, work_total: float) -> None:
        job.tell(
            Calibrated(
                part * total + done,
                n_parts * total,
                "block passes",
                work_done=part * work_total + work_done,
                work_total=n_parts * work_total,
            )
        )

    with ActivationCache(job.budget.activations, job.scratch / "activations") as cache:
        for found in statistics_of(job.source, job.map, windows, first, wanted, known, cache, progress):
            _store_all(found, into)


def _collect_part(
    model: Path,
    mapped: ModelMap,
    windows: Tensor,
    first: int,
    wanted: Wanted,
    place: tuple[Path, dict[str, Any]],
    limit: int | None,
    scratch: Path,
    device: str,
    inputs: None,
) -> None:
    """Measure a part of the windows in a worker, which writes the records of its part itself."""
    into = Measurements(*place)
    known = [layer.source for layer in mapped.layers if layer.source in into]
    source = opened(model, device)
    with ActivationCache(limit, scratch) as cache:
        for found in statistics_of(source, mapped, windows, first, wanted, known, cache):
            _store_all(found, into)


def _store_all(found: dict[str, SourceStatistics], into: Measurements) -> None:
    """Store statistics and free them, whoever else still holds the dict."""
    for source in list(found):
        into.store(found.pop(source))


def _part_of(measurements: Measurements, index: int, n_parts: int) -> Measurements:
    facts = {**measurements.facts, "part": f"{index + 1} of {n_parts}"}
    return Measurements(measurements.folder.parent, facts)
