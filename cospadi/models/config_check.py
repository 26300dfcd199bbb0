"""Checks of a model's config.json before memory of its size is taken, each failure in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from cospadi.errors import CheckpointError, CospadiError
from cospadi.files import one_line, shown
from cospadi.formats import StoredTensor

_SPARE_BYTES = 64 * 2**20


@contextmanager
def errors_in_one_line(folder: str | Path) -> Iterator[None]:
    """Turn what a damaged configuration makes transformers raise into one line.

    Raises
    ------
    CheckpointError
        With that error, unless it is one of ours.
    """
    from huggingface_hub.errors import StrictDataclassError

    raised = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
    try:
        yield
    except CospadiError:
        raise
    except (*raised, TypeError, ValueError, SafetensorError, StrictDataclassError) as error:
        text = one_line(f"{type(error).__name__}: {error}")
        raise CheckpointError(f"{folder}: transformers cannot open it ({text})") from error


def refuse_absurd_counts(config: Any, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse more layers or experts than there are tensors for: their skeleton alone would take time and memory.

    Raises
    ------
    CheckpointError
        Names the key of config.json.
    """
    most = max([len(tensors), *(stored.shape[0] for stored in tensors.values() if len(stored.shape) == 3)])
    for key in ("num_hidden_layers", "num_local_experts", "num_experts", "n_routed_experts"):
        count = getattr(config.get_text_config(), key, 0)
        if isinstance(count, int) and count > most:
            raise CheckpointError(f"config.json: {key} is {shown(count)}, but the tensors suffice for {most} at most")


def refuse_absurd_sizes(folder: Path, skeleton: nn.Module, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a model on the meta device that is much larger than what the folder holds.

    Raises
    ------
    CheckpointError
        Its parameters could not all be there, or the buffers that it computes would take more than the files.
    """
    stored = sum(prod(one.shape) for one in tensors.values())
    wanted = sum(parameter.numel() for parameter in skeleton.parameters())
    if wanted > 2 * stored:  # a tied matrix is stored once and may count twice here
        raise CheckpointError(
            f"{folder}: its config.json describes {wanted:,} parameters, but its files hold {stored:,}"
        )
    computed = sum(buffer.nbytes for buffer in skeleton.buffers())
    held = sum(prod(one.shape) * one.dtype.itemsize for one in tensors.values())
    if computed > held + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder}: by its config.json the model would compute {computed:,} bytes of buffers, but its files hold "
            f"{held:,} bytes"
        )
