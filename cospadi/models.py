"""Open dense transformers models."""

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cospadi.errors import UsageError


@dataclass(frozen=True)
class OpenModel:
    """A model ready for calibration.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode, in float32 on a CPU and in its own dtype on a GPU.
    tokenizer : tokenizer or None
        None if the folder has none.
    dtypes : dict of str to torch.dtype
        The dtype that each parameter and buffer has in the source, by name.
    name : str
        The hub id, the folder's own name (not where it lies), or the name in the model's config.
    """

    model: Any
    tokenizer: Any
    dtypes: dict[str, torch.dtype]
    name: str

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most parameters in the source."""
        counts = Counter(d for d in self.dtypes.values() if d.is_floating_point)
        return counts.most_common(1)[0][0]


def read_config(name: str | Path) -> Any:
    """Read the config of a model, from a local folder or the hub.

    Raises
    ------
    UsageError
        There is no such model.
    """
    from transformers import AutoConfig

    folder = Path(name)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UsageError(f"{name} is not a model folder: it has no config.json")
    if not folder.exists() and (folder.is_absolute() or len(folder.parts) > 2 or str(name)[:1] in (".", "~")):
        raise UsageError(f"{name}: no such folder")  # asking the hub, with its retries, would take half a minute
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(
            f"model {str(name)!r} cannot be loaded: no such folder, and the hub says: {text[:200]}"
        ) from error


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
    except (OSError, ValueError, TypeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"model {str(name)!r} has no usable tokenizer: {text[:200]}") from error


def model_class(config: Any) -> Any:
    """Give the transformers class that a config names.

    Raises
    ------
    UsageError
        The architecture is not part of transformers: running code from a model's folder is refused.
    """
    import transformers

    names = config.architectures or [None]
    cls = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise UsageError(
            f"architecture {names[0]!r} is not a model of transformers {transformers.__version__}; "
            "code from a model's folder is never run"
        )
    return cls


def open_model(model: Any, device: torch.device, tokenizer: Any = None) -> OpenModel:
    """Load a dense model for calibration.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A local folder, a hub id, or a model, which is copied and left as it is.
    device : torch.device
        Where to put it.
    tokenizer : tokenizer, optional
        Taken from the folder if not given.

    Raises
    ------
    UsageError
        There is no such model, or it is already compressed or quantised.
    """
    if isinstance(model, nn.Module):
        name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        loaded = copy.deepcopy(model)
    else:
        loaded, tokenizer = _load(str(model), tokenizer)
        name = Path(model).resolve().name if Path(model).exists() else str(model)
    if getattr(loaded.config, "quantization_config", None) is not None:
        raise UsageError(f"{name} is already quantised or compressed: give the dense model")
    dtypes = {key: tensor.dtype for key, tensor in (*loaded.named_parameters(), *loaded.named_buffers())}
    if device.type == "cpu":
        loaded = loaded.float()
    return OpenModel(loaded.to(device).eval(), tokenizer, dtypes, name)


def _load(name: str, tokenizer: Any) -> tuple[Any, Any]:
    config = read_config(name)
    if getattr(config, "quantization_config", None) is not None:
        raise UsageError(f"{name} is already quantised or compressed: give the dense model")
    loaded = model_class(config).from_pretrained(name, dtype="auto", trust_remote_code=False)
    return loaded, tokenizer or read_tokenizer(name)
