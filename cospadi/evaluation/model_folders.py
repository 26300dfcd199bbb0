"""Measure models in folders, dense or compressed: whole or block by block, in this process or by workers."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cospadi.arrays import dtype_name, torch_device
from cospadi.calibration import ActivationCache
from cospadi.errors import UsageError
from cospadi.evaluation.activation_budget import activation_budget
from cospadi.evaluation.comparison import Measurement, Protocol
from cospadi.evaluation.generation import generate
from cospadi.evaluation.likelihood import batch_nlls, check_windows, summarize
from cospadi.evaluation.multiple_choice import ChoicesResult, score_choices
from cospadi.evaluation.streaming import open_streamed
from cospadi.executors import Task, make_executor
from cospadi.formats import QUANT_METHOD
from cospadi.integrations import load
from cospadi.models import keep_small_heap, model_class, open_model, read_config, read_tokenizer
from cospadi.recipe import Execution

NO_SAMPLE = "no sample was written: with max_memory the whole model would be read from disk for every token"


@dataclass(frozen=True, eq=False)
class _Part:
    """What one task measures: batches that follow one another, by one model.

    Attributes
    ----------
    path : str
        The model.
    protocol : Protocol
        With the windows of this part; the first part of a model also has the questions and the prompt.
    first : int
        Number of the first window.
    backend : str
    max_memory : int or None
        Of the process that measures; with it the model is read block by block.
    """

    path: str
    protocol: Protocol
    first: int
    backend: str
    max_memory: int | None


@dataclass(frozen=True)
class _Found:
    """What was measured of a part."""

    nlls: list[float]
    dtype: str
    choices: ChoicesResult | None = None
    sample: str | None = None


def measure_folders(
    paths: Sequence[str | Path],
    protocol: Protocol,
    backend: str = "auto",
    device: str = "auto",
    execution: Execution | None = None,
    progress: Callable[[float, int], None] = lambda done, total: None,
) -> list[Measurement]:
    """Measure causal language models.

    The result does not depend on the number of workers, since the NLLs of the batches are added up in the order of the
    text.  A single worker has one model in memory at a time.

    Parameters
    ----------
    paths : sequence of str or Path
        Folders of dense or compressed models, or hub ids of dense ones.
    protocol : Protocol
    backend : str
        Registry name of the runtime of compressed layers.
    device : str
        ``auto`` is a GPU where there is one.
    execution : Execution, optional
        With ``max_memory`` no more than one block of a model is in memory, and there is no sample.
    progress : callable (done, total)
        Receives the batches that are done and their number, over all models; done is a fraction where a model is read
        block by block.

    Returns
    -------
    list of Measurement
        One per path.

    Raises
    ------
    UsageError
        There is no such model, it is not a causal language model, the limit on memory is too low, or there are
        questions although there is a limit.
    NumericalError
        A model's log-probabilities are NaN or infinite.
    """
    execution = execution or Execution()
    limited = execution.max_memory is not None
    if limited and protocol.questions:
        raise UsageError("multiple choice needs the whole model in memory: leave out max_memory, or the questions")
    check_windows(protocol.windows)
    own = replace(protocol, prompt=None) if limited else protocol
    with make_executor(
        execution.executor,
        device=str(torch_device(device)),
        workers=execution.workers,
        threads=execution.threads,
        ray_address=execution.ray_address,
        ray_inputs=execution.ray_inputs,
    ) as executor:
        here = executor.n_workers == 1 and execution.executor == "local"
        # A worker on another machine does not share this process's folder.
        names = [str(path if here or not Path(path).exists() else Path(path).absolute()) for path in paths]
        by_model = [_parts(name, own, backend, execution.max_memory, executor.n_workers) for name in names]
        parts = [part for of_model in by_model for part in of_model]
        told = _Progress([len(part.protocol.batches) for part in parts], progress)
        tasks = [
            Task(
                f"evaluation of {part.path}, from window {part.first}",
                float(len(part.protocol.windows)),
                # Only a task in this process can report its progress.
                partial(_measure, part, partial(told, index) if here else None),
            )
            for index, part in enumerate(parts)
        ]
        found: dict[_Part, _Found] = {}
        for index, result in executor.run(tasks):
            found[parts[index]] = result
            told(index, 1.0)
    measured = []
    for path, of_model in zip(paths, by_model, strict=True):
        mine = [found[part] for part in of_model]
        nlls = [nll for one in mine for nll in one.nlls]
        measured.append(
            Measurement(
                perplexity=summarize(nlls, protocol.windows, read_tokenizer(path)),
                choices=mine[0].choices,
                sample=mine[0].sample,
                note=NO_SAMPLE if limited and protocol.prompt else None,
                dtype=mine[0].dtype,
            )
        )
    return measured


def load_model(path: str | Path, backend: str = "auto", device: str = "auto", checksums: bool = True) -> Any:
    """Load a causal language model, dense or compressed, in evaluation mode: in float32 on a CPU.

    Parameters
    ----------
    path : str or Path
        A folder, or for a dense model also a hub id.
    backend, device : str
        As for ``measure_folders``.
    checksums : bool
        Compare a compressed checkpoint's files with its SHA256SUMS.

    Raises
    ------
    UsageError
        There is no such model, or it is not a causal language model.
    """
    device = str(torch_device(device))
    described = getattr(_causal_config(path), "quantization_config", None) or {}
    if described.get("quant_method") != QUANT_METHOD:
        return open_model(str(path), torch.device(device)).model
    # CPUs compute bfloat16 slowly, some of them in emulation; on a GPU the stored dtype is the one that is deployed.
    dtype = torch.float32 if device == "cpu" else None
    return load(path, backend=backend, dtype=dtype, device=device, checksums=checksums)


def _parts(path: str, protocol: Protocol, backend: str, max_memory: int | None, n_parts: int) -> list[_Part]:
    """Divide the batches among workers; there are fewer parts than workers if there are fewer batches."""
    size, count = protocol.batch_size, len(protocol.batches)
    n_parts = min(n_parts, count)
    starts = [size * (count * index // n_parts) for index in range(n_parts)]
    parts = []
    for start, end in zip(starts, [*starts[1:], len(protocol.windows)], strict=True):
        own = replace(protocol, windows=protocol.windows[start:end].clone())  # a view takes the whole text with it
        own = own if start == 0 else replace(own, prompt=None, questions=None)
        parts.append(_Part(path, own, start, backend, max_memory))
    return parts


def _measure(part: _Part, progress: Callable[[float], None] | None, device: str, inputs: None) -> _Found:
    """Measure a part, in this process or in a worker."""
    protocol, nlls = part.protocol, list[float]()
    tell = progress or (lambda share: None)
    _causal_config(part.path)
    checksums = part.first == 0  # once for all parts of a model
    if part.max_memory is not None:
        keep_small_heap()
        source = open_streamed(part.path, part.backend, torch.device(device), checksums)
        limit = activation_budget(source, protocol.windows, protocol.batch_size, part.max_memory)
        with (
            tempfile.TemporaryDirectory(prefix="cospadi-") as scratch,
            ActivationCache(limit, Path(scratch) / "activations") as cache,
        ):
            nlls += source.batch_nlls(protocol.windows, protocol.batch_size, part.first, cache, tell)
        return _Found(nlls, dtype_name(source.model.dtype))
    model = load_model(part.path, part.backend, device, checksums)
    for nll in batch_nlls(model, protocol.windows, protocol.batch_size, part.first):
        nlls.append(nll)
        tell(len(nlls) / len(protocol.batches))
    tokenizer = read_tokenizer(part.path)
    return _Found(
        nlls,
        dtype_name(model.dtype),
        score_choices(model, tokenizer, protocol.questions) if protocol.questions else None,
        generate(model, tokenizer, protocol.prompt) if protocol.prompt else None,
    )


class _Progress:
    """Adds up what the parts have done."""

    def __init__(self, sizes: list[int], tell: Callable[[float, int], None]) -> None:
        self._sizes, self._tell = sizes, tell
        self._done = [0.0] * len(sizes)
        tell(0.0, sum(sizes))

    def __call__(self, index: int, share: float) -> None:
        before, self._done[index] = self._done[index], self._sizes[index] * share
        if self._done[index] != before:
            self._tell(sum(self._done), sum(self._sizes))


def _causal_config(path: str | Path) -> Any:
    config = read_config(path)
    if not model_class(config).can_generate():
        raise UsageError(f"{path} is not a causal language model: perplexity and generation need one")
    return config
