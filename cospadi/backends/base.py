"""What a runtime backend takes and gives: y = (x D) S for the layers of one group.

``prepare`` may repack, compile or upload; ``project`` and ``combine`` only run.  The members of a group that shares its
input compute x D once and combine it with their own coefficients.
"""

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cospadi.formats.base import PackedCoefficients
from cospadi.registry import Availability, Registry


@dataclass(frozen=True)
class Placement:
    """Where and in what precision a group is to run."""

    device: torch.device
    dtype: torch.dtype


class Backend(abc.ABC):
    """Base of the runtime backends; stateless.

    Law: combine(project(x)) equals x @ D @ S in float64 within the tolerance of the placement's dtype, for any number
    of tokens, any strides of x and any support, and neither changes its inputs.
    """

    name: ClassVar[str]

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether the backend can run on this machine, with the reason if not."""
        return Availability(True)

    @abc.abstractmethod
    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Tell whether the backend can run these coefficients at this place, with the reason if not."""

    @abc.abstractmethod
    def prepare_dictionary(self, dictionary: Tensor, placement: Placement) -> Any:
        """Make ready a dictionary given as stored: shape (n_atoms, in_features), atoms as rows."""

    @abc.abstractmethod
    def prepare_coefficients(self, packed: PackedCoefficients, placement: Placement) -> Any:
        """Make ready the coefficients of one member."""

    @abc.abstractmethod
    def project(self, dictionary: Any, x: Tensor) -> Tensor:
        """Give z = x D, shape (..., n_atoms), from x of shape (..., in_features)."""

    @abc.abstractmethod
    def combine(self, coefficients: Any, z: Tensor) -> Tensor:
        """Give y = z S, shape (..., out_features), from z of shape (..., n_atoms)."""


BACKENDS: Registry[Backend] = Registry("cospadi.backends", "backend")
