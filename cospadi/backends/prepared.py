"""What a backend prepared from stored tensors, and whether the tensors have changed since."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor

from cospadi.backends.base import Backend, Placement


class Sources:
    """The tensors that something was prepared from, with a check for replacement and changes in place.

    The check runs on every call of a layer, so it must be fast.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        # Tensors made in inference mode keep no count of changes.
        self._counted = not any(tensor.is_inference() for tensor in tensors)
        self._versions = [tensor._version for tensor in tensors] if self._counted else []

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether these are the same tensors, or other views of all their memory, unchanged."""
        if not all(map(is_, tensors, self._tensors)):
            # The tensors are held here, so no other tensor can get their addresses.
            if [tensor.data_ptr() for tensor in tensors] != self._addresses:
                return False
            if self._counted and any(tensor.is_inference() for tensor in tensors):
                return False
        return not self._counted or [tensor._version for tensor in tensors] == self._versions


@dataclass(frozen=True)
class Prepared:
    """What a backend prepared for a placement, and from which tensors.

    Attributes
    ----------
    state : Any
    backend, runner : Backend
        The one that was asked for, and the one that it resolved to.
    dtype : torch.dtype
    sources : Sources
    """

    state: Any
    backend: Backend
    runner: Backend
    dtype: torch.dtype
    sources: Sources

    def fits(self, backend: Backend, dtype: torch.dtype, tensors: Sequence[Tensor]) -> bool:
        """Tell whether it was prepared by this backend, for this dtype and from these tensors as they are now."""
        same_backend = self.backend is backend or self.backend == backend
        return self.dtype is dtype and same_backend and self.sources.are(tensors)


def prepare(
    make: Callable[[Backend], Any], backend: Backend, placement: Placement, tensors: Sequence[Tensor]
) -> Prepared:
    """Let a backend prepare, without gradients and outside of inference mode."""
    runner = backend.resolve(placement)
    with torch.inference_mode(False), torch.no_grad():
        state = make(runner)
    return Prepared(state, backend, runner, placement.dtype, Sources(tensors))
