"""Choose a backend by device and dtype."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from cospadi.backends.base import BACKENDS, Backend, Placement
from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability


def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name the backend for a place, and why.

    Returns
    -------
    name, reason : str
    """
    if device.type == "cuda":
        return "cuda", "the model is on an NVIDIA GPU"
    if device.type == "cpu":
        return "torch", f"the model is on a CPU ({str(dtype).removeprefix('torch.')})"
    return "reference", f"no backend is made for {device.type} devices: plain torch"


@dataclass(frozen=True)
class _Chosen:
    """What a chosen backend prepared, with the backend."""

    backend: Backend
    prepared: Any


@final
class AutoBackend(Backend):
    """The best backend for the device and dtype of the input."""

    name: ClassVar[str] = "auto"

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Ask the backend that would be chosen."""
        return _backend(placement).supports(packed, placement)

    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> _Chosen:
        """Let the chosen backend prepare."""
        backend = _backend(placement)
        return _Chosen(backend, backend.prepare_dictionary(dictionary, placement))

    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> _Chosen:
        """Let the chosen backend prepare."""
        backend = _backend(placement)
        return _Chosen(backend, backend.prepare_coefficients(packed, placement))

    def project(self, dictionary: _Chosen, x: Tensor) -> Tensor:
        """Let the chosen backend multiply."""
        return dictionary.backend.project(dictionary.prepared, x)

    def combine(self, coefficients: _Chosen, z: Tensor) -> Tensor:
        """Let the chosen backend multiply."""
        return coefficients.backend.combine(coefficients.prepared, z)


def _backend(placement: Placement) -> Backend:
    return BACKENDS.create(choose(placement.device, placement.dtype)[0])
