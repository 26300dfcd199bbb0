"""A model to measure, with the precision and the backend; plain data, so that another process can load it."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from cospadi.backends import restore_dense
from cospadi.errors import UsageError
from cospadi.formats import QUANT_METHOD
from cospadi.integrations import load
from cospadi.models import model_class, read_config

DENSE = "dense"


@dataclass(frozen=True)
class ModelVariant:
    """A model folder, and how to load it.

    Attributes
    ----------
    path : str
        Folder, or hub id of a dense model.
    backend : str or None
        Registry name for the compressed layers; None multiplies compressed layers out to dense ones.
    device, dtype : str
    """

    path: str
    backend: str | None
    device: str
    dtype: str

    @property
    def label(self) -> str:
        """Name the model in tables."""
        return self.backend or DENSE


def load_variant(wanted: ModelVariant) -> Any:
    """Load a model in evaluation mode.

    Raises
    ------
    UsageError
        There is no such model, or the backend cannot run.
    CheckpointError
        The checkpoint is damaged.
    """
    dtype, device = getattr(torch, wanted.dtype), torch.device(wanted.device)
    config = read_config(wanted.path)
    described = getattr(config, "quantization_config", None) or {}
    if wanted.backend is None and not described:
        model = model_class(config).from_pretrained(wanted.path, dtype=dtype, trust_remote_code=False)
        return model.to(device).eval()
    if wanted.backend is None and described.get("quant_method") != QUANT_METHOD:
        raise UsageError(f"{wanted.path} is quantised or compressed by another method: give the dense model")
    model = load(wanted.path, backend=wanted.backend or "reference", dtype=dtype, device=device)
    if wanted.backend is None:
        restore_dense(model, dtype)
        # The other tensors are views of the mapped file, which would keep the compressed tensors in memory too.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            tensor.data = tensor.data.clone()
    return model
