"""The contract of a runtime backend: y = (x D) S for the layers of one group.

Each of the two products can run alone.  With the dictionary on the side of the outputs, a layer computes x S^T first
and then a product with D^T, whose rows are stored like atoms.

``prepare_*`` may repack, compile or upload; ``multiply`` only runs.  The members of a group that shares its input are
prepared side by side, so that x D is computed once and all their outputs come from one call.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cospadi.formats import PackedCoefficients, PackedDictionary
from cospadi.registry import Availability, Registry


@dataclass(frozen=True)
class Placement:
    """Where and in what precision a group is to run."""

    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Backend(abc.ABC):
    """Base of the runtime backends; stateless but for options.

    Laws: ``multiply`` equals x @ D @ S in float64 within the tolerance of the placement's dtype, for any number of
    tokens and any support; it gives the same bits every time, does not change what it is given, waits for nothing, and
    takes memory from torch only.  The operator ``cospadi::linear`` computes the gradients.
    """

    name: ClassVar[str]
    any_shape: ClassVar[bool] = False
    """Whether ``multiply`` accepts x of shape (..., in_features); this saves two views on every call."""

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether the backend can run on this machine, with the reason if not."""
        return Availability(True)

    def resolve(self, placement: Placement) -> "Backend":
        """Give the backend that runs at a place: itself, unless it chooses among others."""
        return self

    @abc.abstractmethod
    def supports(self, packed: PackedCoefficients, placement: Placement) -> Availability:
        """Tell whether the backend can run these coefficients at this place, with the reason if not."""

    @abc.abstractmethod
    def prepare_dictionary(self, dictionary: PackedDictionary, placement: Placement) -> Any:
        """Prepare a dictionary for ``multiply``."""

    @abc.abstractmethod
    def prepare_coefficients(self, members: Sequence[PackedCoefficients], placement: Placement) -> Any:
        """Prepare the coefficients of layers that share dictionary and input, with their columns side by side."""

    @abc.abstractmethod
    def multiply(self, dictionary: Any, coefficients: Any, x: Tensor, member: int | None) -> Tensor:
        """Give y = (x D) S.

        Parameters
        ----------
        dictionary
            As prepared for the device and dtype of x.  None leaves the first product out: y = x S.
        coefficients
            Prepared likewise.  Those of the format ``identity`` leave the second product out: y = x D.  At least one of
            the two products is present.
        x : Tensor, shape (n_tokens, in_features), contiguous
            At least one token.  Without a dictionary of shape (n_tokens, n_atoms).
        member : int or None
            Index of the layer that is wanted; None for all, their outputs side by side.

        Returns
        -------
        Tensor, shape (n_tokens, out_features), contiguous
            New, in the dtype of x.
        """


BACKENDS: Registry[Backend] = Registry("cospadi.backends", "backend")
