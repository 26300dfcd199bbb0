"""Compress a model: the stages, in order.

open the model, find its layers, form groups -> check everything and predict the memory -> collect statistics of each
layer's inputs -> profile the groups and allocate the bytes -> for each group: whiten, solve, round, pack, record ->
write the checkpoint and the report.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from cospadi.allocation import check_plan
from cospadi.arrays import torch_device
from cospadi.calibration import Gram
from cospadi.errors import UsageError
from cospadi.events import Listener, Retried, Written
from cospadi.executors import make_executor
from cospadi.models import keep_small_heap, open_model
from cospadi.pipeline.group_inputs import reader_of
from cospadi.pipeline.job import Job, Workplace
from cospadi.pipeline.mapped_model import find_layers
from cospadi.pipeline.measure_inputs import calibrate, grams_by_block
from cospadi.pipeline.memory_plan import plan_memory
from cospadi.pipeline.plan import match_groups, plan_groups
from cospadi.pipeline.setup import (
    batch_size_of,
    check_execution,
    check_order,
    check_windows,
    choose_method,
    fingerprints_of,
    measurement_facts,
    open_mapped_model,
    threads_of,
)
from cospadi.pipeline.solve_groups import solve_groups
from cospadi.pipeline.stage_times import StageTimes
from cospadi.pipeline.statistics_store import Measurements
from cospadi.pipeline.work_folder import WorkFolder, check_output, is_finished
from cospadi.pipeline.write_result import finished_report, write_result
from cospadi.recipe import CompressionConfig, Execution
from cospadi.reporting import Report


def compress(
    model: Any,
    out: str | Path,
    config: CompressionConfig | None = None,
    *,
    tokenizer: Any = None,
    windows: Tensor | None = None,
    cache: str | Path | None = None,
    resume: bool = False,
    execution: Execution | None = None,
    command: str | None = None,
    on_event: Listener | None = None,
) -> Report:
    """Compress a model into a checkpoint folder.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, a hub id, or a model (copied, left as it is).
    out : str or Path
        New or empty folder; while the run lasts it holds the finished groups.
    config : CompressionConfig, optional
        The recipe.
    tokenizer : tokenizer, optional
        Needed when a model object is given with no ``windows``; else taken from the folder.
    windows : Tensor, shape (n_windows, seq_len), int64, optional
        Calibration tokens in place of the recipe's text.
    cache : str or Path, optional
        Folder that keeps the statistics and the profile, so that another ratio of the same model costs only allocation
        and solving; several models and recipes may share one.  Without it they are deleted with the records.
    resume : bool
        Continue what an interrupted run left in ``out``; starts afresh where there is nothing, and gives the report of
        a run that has ended.
    execution : Execution, optional
        Where and within how much memory to work; by default in this process, with the whole model in memory.
    command : str, optional
        The command line, for ``cospadi-cli status``.
    on_event : callable, optional
        Told of each step.

    Returns
    -------
    Report
        As written to OUT/report.json.

    Raises
    ------
    UsageError
        Something given is not allowed; nothing was written.
    NumericalError
        NaN or infinity in a layer, which the text names; what was finished stays for ``resume``.
    """
    config, execution = config or CompressionConfig(), execution or Execution()
    out, tell = Path(out), on_event or (lambda event: None)
    check_output(out, resume)
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise UsageError(f"cache {cache} is a file: choose a folder")
    if resume and is_finished(out):
        return finished_report(out, config, tell)

    # Open the model, find its layers, form groups.
    streamed = execution.max_memory is not None
    if streamed:
        keep_small_heap()
    method, reason = choose_method(config)
    threads = threads_of(out, torch_device(config.device), execution)
    mapped = open_mapped_model(model, config, tokenizer=tokenizer, windows=windows, streamed=streamed)

    # Refuse what cannot work, and predict the memory, before anything takes long.
    check_order(config, mapped.groups)
    check_plan(config, method, mapped.groups)
    check_execution(mapped, config, execution)
    budget = plan_memory(mapped, config, batch_size_of(mapped, config), execution.max_memory)

    fingerprints = fingerprints_of(mapped, config)
    with (
        WorkFolder(out, fingerprints, resume, threads) as folder,
        make_executor(
            execution.executor,
            device=mapped.source.device,
            workers=execution.workers,
            threads=folder.threads,
            ray_address=execution.ray_address,
            ray_inputs=execution.ray_inputs,
        ) as executor,
    ):
        executor.retried = lambda task, why: tell(Retried(task, why))
        facts = {key: fingerprints[key] for key in ("model", "calibration", "versions")}
        facts |= measurement_facts(config, mapped.source.device, folder.threads)
        measurements = Measurements(Path(cache) if cache else folder.folder / "measurements", facts)
        several = executor.n_workers > 1 or execution.executor == "ray"
        reader = reader_of(mapped.source, measurements, shared=several)
        shared_storage = execution.ray_inputs == "shared"
        place = Workplace(executor, reader, budget, folder.folder.absolute(), shared_storage)
        job = Job(config, method, reason, mapped, measurements, place, tell)
        tell(budget.predicted)
        if command is not None:
            folder.note("command", command)
        return _run(job, folder, out)


def _run(job: Job, folder: WorkFolder, out: Path) -> Report:
    """Go through the stages, each as far as its records are not there."""
    times = StageTimes(folder)
    folder.note("model", job.model.source.name)
    folder.note("measurements", str(job.measurements.folder.absolute()))
    folder.note("sources", sorted(job.model.sources))

    # Statistics of every distinct input: its Gram, and the sensitivities of the outputs.
    with times.of("calibrating"):
        calibrate(job)
    job = match_groups(job)

    # What each group may become, at which predicted loss increase, and what it becomes.
    plan = plan_groups(job, folder, times)

    # Each group: whiten, solve, round, pack, record.
    with times.of("solving"):
        seconds = solve_groups(job, plan.groups, folder)

    # The checkpoint, the report, the model card.
    with times.of("writing"):
        report = write_result(job, plan, folder, out)
    times.write_run(job, out, seconds)
    folder.remove()
    job.tell(Written(str(out)))
    return report


def collect_grams(model: Any, windows: Tensor, batch_size: int = 8, device: str = "auto") -> dict[str, Gram]:
    """Collect the Gram of every distinct input of the model's linear layers.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        As for ``compress``.
    windows : Tensor, shape (n_windows, seq_len), int64
        Calibration tokens.
    batch_size : int
        Windows per forward pass.
    device : str
        As in the recipe.

    Returns
    -------
    dict of str to Gram
        By the name of the first layer that receives the input.  Grams of other tokens merge with them.
    """
    source = open_model(model, torch_device(device), split=True)
    check_windows(source, windows)
    found: dict[str, Gram] = {}
    for grams in grams_by_block(source, find_layers(source, windows), windows, batch_size):
        found.update(grams)
    return found
