"""Choose a backend by device and dtype."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, final

import torch
from torch import Tensor

from cospadi.backends import tuning
from cospadi.backends.base import BACKENDS, Backend, Placement
from cospadi.formats import PackedCoefficients, PackedDictionary
from cospadi.registry import Availability

logger = logging.getLogger(__name__)

_PREFERRED = {"cuda": "cuda", "cpu": "cpu"}
"""The backend whose kernels are made for each type of device."""

_ANY_LAYER = PackedCoefficients("bitmask", 0, 0, "bfloat16", {})
"""Placeholder for a layer: what the preferred backends support depends on the placement only."""


@lru_cache(maxsize=64)
def choose(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Name the backend for a place, and why; asked once per place and process.

    Returns
    -------
    name, reason : str
    """
    preferred = _PREFERRED.get(device.type)
    if preferred is None:
        return "reference", f"no backend is made for {device.type} devices: dense products of torch"
    # An unavailable backend cannot be asked about a placement.  An available one may still not support it.
    state = BACKENDS.availability(preferred)
    if state:
        state = BACKENDS.create(preferred).supports(_ANY_LAYER, Placement(device, dtype))
    kind = str(dtype).removeprefix("torch.")
    if state:
        chosen = preferred, f"it is made for {_called(device)} and takes {kind}"
    else:
        chosen = "torch", f"backend {preferred!r} cannot run {kind} here: {state.reason}"
    logger.info("backend %s for %s on %s: %s", chosen[0], kind, device, chosen[1])
    return chosen


def explain(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Describe in one line which backend runs at a placement: for ``auto`` its choice, the reason and the options."""
    if backend != AutoBackend.name:
        return backend
    name, reason = choose(device, dtype)
    options = tuning.options_for(name, device, dtype)
    measured = "".join(f", {key}={value} (measured)" for key, value in options.items())
    return f"auto chose {name}{measured}: {reason}"


@final
class AutoBackend(Backend):
    """The best backend for the device and dtype of the input, with the thresholds that were measured for it."""

    name: ClassVar[str] = "auto"

    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Ask the backend that would be chosen."""
        return self.resolve(placement).supports(packed, placement)

    def resolve(self, placement: Placement) -> Backend:
        """Give the chosen backend."""
        name = choose(placement.device, placement.dtype)[0]
        return _create(name, tuple(tuning.options_for(name, placement.device, placement.dtype).items()))

    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> _Chosen:
        """Let the chosen backend prepare."""
        backend = self.resolve(placement)
        return _Chosen(backend, backend.prepare_dictionary(dictionary, placement))

    def prepare_coefficients(self, members: Sequence[PackedCoefficients], placement: Placement) -> _Chosen:
        """Let the chosen backend prepare."""
        backend = self.resolve(placement)
        return _Chosen(backend, backend.prepare_coefficients(members, placement))

    def multiply(self, dictionary: _Chosen | None, coefficients: _Chosen, x: Tensor, member: int | None) -> Tensor:
        """Let the chosen backend multiply."""
        factor = None if dictionary is None else dictionary.prepared
        return coefficients.backend.multiply(factor, coefficients.prepared, x, member)


@dataclass(frozen=True)
class _Chosen:
    """What a chosen backend prepared, with the backend."""

    backend: Backend
    prepared: Any


@lru_cache(maxsize=64)
def _create(name: str, options: tuple[tuple[str, int], ...]) -> Backend:
    return BACKENDS.create(name, dict(options))


def _called(device: torch.device) -> str:
    return "NVIDIA GPUs" if device.type == "cuda" else "CPUs"
