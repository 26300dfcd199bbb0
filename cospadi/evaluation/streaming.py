"""The log-likelihoods of a text by a model, dense or compressed, with one block in memory at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.backends import sparse_modules
from cospadi.calibration import ActivationCache, Lockstep, forward_call
from cospadi.evaluation.likelihood import batch_nll
from cospadi.formats import verify_checkpoint
from cospadi.integrations import CospadiConfig, CospadiQuantizer, require_checkpoint
from cospadi.models import FolderWeights, Residency, Weights, find_blocks, make_skeleton, open_model, read_config


@dataclass(frozen=True)
class StreamedModel:
    """A causal language model whose weights are in memory for one block at a time.

    Attributes
    ----------
    model : PreTrainedModel
        On the meta device, in the dtypes of the computation.
    weights : Weights
        Reads its tensors.
    device : torch.device
        Where it runs.
    blocks : tuple of str
        In the order in which they run.
    borrowed : dict of str to tuple of str
        By block, the stored names of the dictionaries that its layers share with layers of other blocks.
    """

    model: Any
    weights: Weights
    device: torch.device
    blocks: tuple[str, ...]
    borrowed: dict[str, tuple[str, ...]]

    @torch.no_grad()
    def batch_nlls(
        self,
        windows: Tensor,
        batch_size: int,
        first: int = 0,
        cache: ActivationCache | None = None,
        progress: Callable[[float], None] = lambda share: None,
    ) -> list[float]:
        """Give the summed NLL of each batch; bit for bit that of ``likelihood.batch_nlls`` for the whole model.

        Parameters
        ----------
        windows : Tensor, shape (n_windows, window), int64
        batch_size : int
        first : int
            Number of the first window, for error texts.
        cache : ActivationCache, optional
            Keeps the hidden states between the blocks.
        progress : callable (share)
            Receives the fraction that is done, after each block and after the head.
        """
        batches, nlls = windows.split(batch_size), list[float]()

        def take(index: int, result: Any) -> None:
            nlls.append(batch_nll(result.logits, batches[index].to(self.device), first + index * batch_size))

        residency = Residency(self.model, self.blocks, self.weights, self.device)
        blocks = [self.model.get_submodule(name) for name in self.blocks]
        call = forward_call(self.model, self.device)
        with residency.attached(), Lockstep(blocks, call, batches, cache) as walk:
            for done, (name, block) in enumerate(zip(self.blocks, blocks, strict=True), start=1):
                residency.enter(name)  # before borrowing: it drops the tensors of all other blocks
                with self._borrowing(name):
                    walk.advance()
                for layer in sparse_modules(block).values():
                    layer.forget()  # drops what the backend prepared
                progress(done / (len(blocks) + 1))
            walk.finish(take)
        progress(1.0)
        return nlls

    @contextmanager
    def _borrowing(self, block: str) -> Iterator[None]:
        """Keep in memory the dictionaries that layers of a block share with layers of other blocks."""
        empty: list[tuple[nn.Module, str, Tensor]] = []
        try:
            for name, tensor in self.weights.read(self.borrowed.get(block, ())).items():
                module, _, own = name.rpartition(".")
                owner = self.model.get_submodule(module)
                before = getattr(owner, own)
                empty.append((owner, own, before))
                tensor = tensor.to(self.device)
                setattr(owner, own, nn.Parameter(tensor, False) if isinstance(before, nn.Parameter) else tensor)
            yield
        finally:
            for owner, own, before in empty:
                setattr(owner, own, before)


def open_streamed(path: str | Path, backend: str, device: torch.device, checksums: bool = True) -> StreamedModel:
    """Open a model folder, dense or compressed, without reading its weights into memory.

    Parameters
    ----------
    path : str or Path
        The folder, or for a dense model also a hub id.
    backend : str
        Registry name of the runtime of compressed layers.
    device : torch.device
        Of the computation; on a CPU everything but the factors is float32.
    checksums : bool
        Compare a compressed checkpoint's files with its SHA256SUMS.

    Raises
    ------
    UsageError
        There is no such model, or its architecture has no list of blocks.
    UnavailableError
        The backend cannot run on this machine.
    CheckpointError
        A file is missing or damaged.
    """
    config = read_config(path)
    if getattr(config, "quantization_config", None) is None:
        source = open_model(path, device, streamed=True)
        return StreamedModel(source.model, source.weights, device, tuple(find_blocks(source.model)), {})
    folder = Path(path)
    require_checkpoint(folder)
    verify_checkpoint(folder, checksums=checksums)
    if device.type == "cpu":
        config.dtype = torch.float32
    quantizer = CospadiQuantizer(CospadiConfig(**{**config.quantization_config, "backend": backend}))
    quantizer.validate_environment()
    model = make_skeleton(config, folder)
    blocks = tuple(find_blocks(model))  # while their layers are ordinary ones
    quantizer.preprocess_model(model)
    quantizer.postprocess_model(model)
    for name, buffer in list(model.named_buffers()):
        if not buffer.is_meta:  # computed, not stored
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, buffer.to(device))
    return StreamedModel(model, FolderWeights(folder, model), device, blocks, _borrowed(model, blocks))


def _borrowed(model: nn.Module, blocks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Give by block the stored names of the dictionaries that its layers share with an owner elsewhere."""
    layers = sparse_modules(model)
    names = {id(layer): name for name, layer in layers.items()}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for block in blocks:
        for name, layer in layers.items():
            owner = names[id(layer.owner)]
            if name.startswith(f"{block}.") and not owner.startswith(f"{block}."):
                found[block].update(dict.fromkeys(f"{owner}.{local}" for local in layer.owner.dictionary_names))
    return {block: tuple(borrowed) for block, borrowed in found.items()}
