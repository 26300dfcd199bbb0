"""Open dense transformers models."""

import copy
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cospadi.errors import NumericalError, UsageError
from cospadi.files import one_line, read_json, shown
from cospadi.formats import INDEX, SINGLE, read_headers
from cospadi.models.config_check import errors_in_one_line, refuse_absurd_counts, refuse_absurd_sizes
from cospadi.models.experts import split_experts
from cospadi.models.layers import find_blocks, oriented
from cospadi.models.residency import Residency
from cospadi.models.weights import ExpertWeights, FolderWeights, ModelWeights, Weights

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class OpenModel:
    """A model ready for calibration.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode, in float32 on a CPU and in its own dtype on a GPU.  If it is streamed, its weights are there
        only while ``running``, block by block.
    tokenizer : tokenizer or None
        None if the folder has none.
    dtypes : dict of str to torch.dtype
        The dtype that each parameter and buffer has in the source, by name.
    name : str
        The hub id, the folder's own name (not where it lies), or the name in the model's config.
    weights : Weights
        Its tensors as they are in the source.
    device : torch.device
        Where it runs.
    folder : Path or None
        Where it was read from; None for a model that was given as an object.
    streamed : bool
        Whether no more than one block is to be in memory.
    experts : tuple of str
        Modules of fused experts that were split into linear layers.
    unused : tuple of str
        Tensors of the folder that the model has no place for.
    """

    model: Any
    tokenizer: Any
    dtypes: dict[str, torch.dtype]
    name: str
    weights: Weights
    device: torch.device
    folder: Path | None = None
    streamed: bool = False
    experts: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters in the source."""
        counts = Counter(d for d in self.dtypes.values() if d.is_floating_point)
        return counts.most_common(1)[0][0]

    @contextmanager
    def running(self) -> Iterator[Any]:
        """Let the model run: where it is streamed, each block's weights come and go with its turn."""
        if not self.streamed:
            yield self.model
            return
        with self._residency(self.model).attached():
            yield self.model

    @contextmanager
    def twin(self) -> Iterator[tuple[Any, Callable[[str], None]]]:
        """Give a second model of the same weights that may be changed, running, and what loads a block of it.

        Where it is streamed, a change lasts until another block runs or is loaded.
        """
        second = copy.deepcopy(self.model)
        if not self.streamed:
            yield second, lambda block: None
            return
        with self._residency(second).attached() as residency:
            yield second, residency.enter

    def matrix(self, name: str) -> Tensor:
        """Give W of a linear layer, shape (in_features, out_features), as calibration uses it."""
        module = self.model.get_submodule(name)
        return oriented(module, self._tensor(f"{name}.weight", module.weight))

    def bias(self, name: str) -> Tensor:
        """Give the bias of a linear layer as calibration uses it."""
        return self._tensor(f"{name}.bias", self.model.get_submodule(name).bias)

    def digest(self) -> str:
        """Give the SHA-256 of all names, dtypes, shapes and bytes.

        Raises
        ------
        NumericalError
            A parameter holds NaN or infinity: all of them are read here, so that a run ends before it begins.
        """
        digest = hashlib.sha256()
        for name, buffer in (*self.model.named_parameters(), *self.model.named_buffers()):
            tensor = self.weights[name] if buffer.is_meta else buffer.detach()
            if isinstance(buffer, nn.Parameter) and not _is_finite(tensor):
                raise NumericalError(f"{self.name}: tensor {name} holds NaN or infinity")
            digest.update(f"{name} {self.dtypes.get(name)} {tuple(tensor.shape)}".encode())
            tensor = tensor.to(buffer.dtype).contiguous().cpu()
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _tensor(self, name: str, placed: Tensor) -> Tensor:
        tensor = placed.detach()
        return self.weights[name].to(self.device, tensor.dtype) if tensor.is_meta else tensor

    def _residency(self, model: Any) -> Residency:
        return Residency(model, tuple(find_blocks(model)), self.weights, self.device)


def read_config(name: str | Path) -> Any:
    """Read the config of a model, from a local folder or the hub.

    Raises
    ------
    UsageError
        There is no such model, or transformers does not know its kind.
    CheckpointError
        config.json is damaged.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, __version__

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UsageError(f"{name} is not a model folder: it has no config.json")
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or str(name)[:1] in (".", "~")):
        raise UsageError(f"{name}: no such folder")  # asking the hub, with its retries, would take half a minute
    if folder.exists():
        kind = read_json(folder, "config.json").get("model_type")
        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            raise UsageError(
                f"{name}: its config.json names model type {shown(kind)}, which transformers {__version__} does not "
                "know; code from a model's folder is never run"
            )
    with errors_in_one_line(name):
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            if folder.exists():
                raise
            text = one_line(str(error))[:200]
            raise UsageError(
                f"model {str(name)!r} cannot be loaded: no such folder, and the hub says: {text}"
            ) from error
    # The class is one of transformers' own; what is written must not send others to the folder's code either.
    config.__dict__.pop("auto_map", None)
    return config


def read_tokenizer(name: str | Path) -> Any:
    """Load the tokenizer of a model.

    Raises
    ------
    UsageError
        The model has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what a damaged file makes the tokenizers library raise is a bare Exception
        raise UsageError(f"model {str(name)!r} has no usable tokenizer: {one_line(str(error))[:200]}") from error


def model_class(config: Any) -> Any:
    """Give the transformers class that a config names.

    Raises
    ------
    UsageError
        The architecture is not part of transformers: running code from a model's folder is refused.
    """
    import transformers

    names = config.architectures if isinstance(config.architectures, list) and config.architectures else [None]
    cls = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise UsageError(
            f"architecture {shown(names[0])} is not a model of transformers {transformers.__version__}; "
            "code from a model's folder is never run"
        )
    return cls


def open_model(
    model: Any, device: torch.device, tokenizer: Any = None, *, streamed: bool = False, split: bool = False
) -> OpenModel:
    """Open a dense model for calibration.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A local folder of safetensors, a hub id, or a model, which is copied and left as it is.
    device : torch.device
        Where to put it.
    tokenizer : tokenizer, optional
        Taken from the folder if not given.
    streamed : bool
        Read the weights of each block only when it runs; a model object is in memory in any case.
    split : bool
        Split fused experts into linear layers.

    Raises
    ------
    UsageError
        There is no such model, or it is already compressed or quantised.
    CheckpointError
        A file of the folder is missing, damaged or leaves it, or lacks a tensor that the model needs.
    """
    folder = None
    unused: tuple[str, ...] = ()
    if isinstance(model, nn.Module):
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        _refuse_quantised(name, model.config)
        loaded, streamed = copy.deepcopy(model), False
        dtypes = {key: tensor.dtype for key, tensor in (*loaded.named_parameters(), *loaded.named_buffers())}
        if device.type == "cpu":
            loaded = loaded.float()
        loaded = loaded.to(device).eval()
        weights: Weights = ModelWeights(loaded, dtypes)
        experts = tuple(split_experts(loaded)) if split else ()
    else:
        folder = local_folder(str(model))
        name = Path(model).resolve().name if Path(model).exists() else str(model)
        config = read_config(folder)
        _refuse_quantised(name, config)
        tokenizer = tokenizer or read_tokenizer(folder)
        with errors_in_one_line(folder):
            loaded = make_skeleton(config, folder)
            weights = stored = FolderWeights(folder, loaded)
        dtypes = {key: tensor.dtype for key, tensor in (*loaded.named_parameters(), *loaded.named_buffers())}
        if device.type == "cpu":
            loaded = loaded.float()
        _place_buffers(loaded, weights, device)
        experts, unused = tuple(split_experts(loaded)) if split else (), stored.unused
        weights = ExpertWeights(weights, experts) if experts else weights
        if not streamed:
            Residency(loaded, tuple(find_blocks(loaded)), weights, device, keep=True).load_all()
            loaded.tie_weights()
    return OpenModel(loaded, tokenizer, dtypes, name, weights, device, folder, streamed, experts, unused)


def local_folder(name: str) -> Path:
    """Give the folder of a model, downloaded from the hub if there is none of that name.

    Raises
    ------
    UsageError
        There is no such model, or its weights are pickles.
    """
    read_config(name)
    folder = Path(name)
    if folder.exists():
        if not (folder / SINGLE).exists() and not (folder / INDEX).exists():
            pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
            if pickles:
                raise UsageError(
                    f"{folder} holds {shown(pickles[0])}, a pickle, which can run code when it is read: save the model "
                    "as safetensors first"
                )
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def make_skeleton(config: Any, folder: Path) -> Any:
    """Make a model without weights: parameters and stored buffers on the meta device, in the dtypes of the source."""
    cls, tensors = model_class(config), read_headers(folder)
    refuse_absurd_counts(config, tensors)
    dtype = config.dtype or next(
        (stored.dtype for stored in tensors.values() if stored.dtype.is_floating_point), torch.float32
    )
    with torch.device("meta"):
        model = cls._from_config(copy.deepcopy(config), dtype=dtype)
    refuse_absurd_sizes(folder, model, tensors)
    plan = model._get_dtype_plan(dtype)  # what an architecture keeps in float32 whatever the rest is in
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in plan):
            tensor.data = tensor.data.to(torch.float32)
    # Buffers that are computed rather than stored; the rest of the model is passed over, being on the meta device.
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    model._initialize_missing_keys(False)
    model.tie_weights()
    return model.eval()


def _place_buffers(model: Any, weights: Weights, device: torch.device) -> None:
    """Load the stored buffers, which are small and stay, and move the computed ones."""
    for name, buffer in list(model.named_buffers()):
        module, _, own = name.rpartition(".")
        tensor = weights[name].to(buffer.dtype) if buffer.is_meta else buffer
        model.get_submodule(module)._buffers[own] = tensor.to(device)


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether all numbers are finite, without a copy of them: both extremes are NaN where one number is."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _refuse_quantised(name: str, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{name} is already quantised or compressed: give the dense model")
