"""What the members of a group share at run time: the dictionary as a backend prepared it, and x D of the last input."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.backends.base import Backend, Placement
from cospadi.factorization import GroupSpec


@dataclass(frozen=True)
class Prepared:
    """What a backend made of stored tensors, and of which versions of which tensors."""

    state: Any
    backend: str
    placement: Placement
    sources: tuple[tuple[Tensor, int], ...]

    def fits(self, backend: str, placement: Placement, tensors: tuple[Tensor, ...]) -> bool:
        """Tell whether it was made by this backend, for this place and of these very tensors as they now are."""
        if (self.backend, self.placement) != (backend, placement):
            return False
        # A compiled graph has its own guards; versions cannot be traced.
        return torch.compiler.is_compiling() or all(
            tensor is source and version_of(tensor) == version
            for tensor, (source, version) in zip(tensors, self.sources, strict=True)
        )


@torch.compiler.disable
def prepare(
    make: Callable[[Any, Placement], Any], source: Any, backend: str, placement: Placement, tensors: tuple[Tensor, ...]
) -> Prepared:
    """Let a backend prepare, outside of any gradient, inference mode or compiled graph."""
    with torch.inference_mode(False), torch.no_grad():
        state = make(source, placement)
    return Prepared(state, backend, placement, tuple((tensor, version_of(tensor)) for tensor in tensors))


def version_of(tensor: Tensor) -> int:
    """Give the count of in-place changes; tensors made in inference mode keep none."""
    return 0 if tensor.is_inference() else tensor._version


@dataclass
class _Projection:
    """x D of the last input, for the members that still wait for it."""

    x: "weakref.ref[Tensor]"
    version: int
    dictionary: Any
    z: Tensor
    waiting: set[str]


class Group:
    """The shared part of a group of layers.

    A plain object, so that a borrower's reference to the owner registers no submodule; a deep copy of a model copies it
    with the rest.

    Parameters
    ----------
    spec : GroupSpec
        The description.

    Attributes
    ----------
    owner : Module
        The member that holds the parameter ``dictionary``; set by the first member.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.owner: Any = None
        self.forget()

    def forget(self) -> None:
        """Drop all that can be computed again."""
        self._prepared: dict[torch.device, Prepared] = {}
        self._projection: _Projection | None = None

    def dictionary(self, backend: Backend, placement: Placement) -> Any:
        """Give the dictionary as the backend prepares it; one per device is kept."""
        sources = (self.owner.dictionary,)
        prepared = self._prepared.get(placement.device)
        if prepared is None or not prepared.fits(backend.name, placement, sources):
            prepared = prepare(backend.prepare_dictionary, sources[0], backend.name, placement, sources)
            self._prepared[placement.device] = prepared
        return prepared.state

    def project(self, backend: Backend, dictionary: Any, x: Tensor, member: str) -> Tensor:
        """Give x D, computed once for all members that receive this very tensor and then released.

        It is not shared where compilation merges equal products anyway, where changes of x cannot be seen (inference
        tensors), and where a graph for gradients would have to outlive its use.
        """
        alone = not self.spec.shared_input or len(self.spec.members) == 1
        if alone or torch.compiler.is_compiling() or x.is_inference() or (torch.is_grad_enabled() and x.requires_grad):
            return backend.project(dictionary, x)
        last = self._projection
        if last is None or last.x() is not x or last.version != x._version or last.dictionary is not dictionary:
            z = backend.project(dictionary, x)
            last = _Projection(weakref.ref(x), x._version, dictionary, z, {m.name for m in self.spec.members})
            self._projection = last
        last.waiting.discard(member)
        if not last.waiting:
            self._projection = None
        return last.z

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_prepared": {}, "_projection": None}
