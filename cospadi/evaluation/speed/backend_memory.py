"""The memory that backends keep besides the stored tensors, and that a call takes temporarily."""

import ctypes
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def extra_bytes(state: Any, stored: Iterable[Tensor]) -> int:
    """Count the memory that a prepared state holds besides the stored tensors.

    Parameters
    ----------
    state : Any
        What a backend prepared: tensors, arrays and ctypes structures within dataclasses, tuples, lists and mappings.
    stored : iterable of Tensor
        They stay in memory anyway, so tensors that share their memory are not counted.
    """
    known = {storage for tensor in stored for storage, _ in _storages(tensor)}
    found: dict[Any, int] = {}
    for leaf in _leaves(state, set()):
        if isinstance(leaf, Tensor):
            found.update((storage, size) for storage, size in _storages(leaf) if storage not in known)
        elif isinstance(leaf, ctypes.Array | ctypes.Structure):
            found[id(leaf)] = ctypes.sizeof(leaf)
        else:
            found[id(leaf)] = int(leaf.nbytes)
    return sum(found.values())


def _storages(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    if tensor.layout == torch.sparse_csr:
        for part in (tensor.crow_indices(), tensor.col_indices(), tensor.values()):
            yield from _storages(part)
    else:
        storage = tensor.untyped_storage()
        yield ("storage", storage.data_ptr()), storage.nbytes()


def _leaves(value: Any, seen: set[int]) -> Iterator[Any]:
    """Give everything in a state that holds memory; streams, modules and plain numbers are not counted."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor | ctypes.Array | ctypes.Structure):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), seen)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item, seen)
    elif all(hasattr(value, name) for name in ("data", "indices", "indptr")):  # sparse matrices of cupy and scipy
        for name in ("data", "indices", "indptr"):
            yield from _leaves(getattr(value, name), seen)
    elif hasattr(value, "nbytes") and hasattr(value, "dtype"):
        yield value


class _Allocations(TorchDispatchMode):
    """Follows the tensors that operators of torch make, and the most bytes that live at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {id(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        foreign = {
            key
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and (key := _key(leaf)) not in self._users
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided and id(leaf) not in given:
                self._add(leaf, foreign)
        return result

    def _add(self, tensor: Tensor, foreign: set[int]) -> None:
        key = _key(tensor)
        if key in foreign:
            return
        size = tensor.untyped_storage().nbytes()
        if key not in self._users:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def scratch_bytes(call: Callable[[], Tensor], device: torch.device) -> int:
    """Count the bytes by which the peak of a call exceeds its result.

    On a CPU these are the tensors that torch's operators make within the call, without the inner memory of a product;
    on a GPU, the memory that torch's allocator hands out.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with _Allocations() as followed:
            result = call()
        peak = followed.peak
    return max(0, peak - result.untyped_storage().nbytes())
