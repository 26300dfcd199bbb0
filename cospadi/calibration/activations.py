"""Activations that wait between two blocks: in memory up to a budget, on disk beyond it."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cospadi.files import storing


class Held:
    """One tensor that waits; made by ``ActivationCache.hold``.

    Attributes
    ----------
    nbytes : int
        Of its storage.
    """

    def __init__(self, tensor: Tensor, nbytes: int, path: Path | None) -> None:
        self.tensor: Tensor | None = tensor
        self.nbytes, self.path = nbytes, path
        self.version = tensor._version
        self.empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self.layout = (tensor.shape, tensor.stride(), tensor.storage_offset())


class ActivationCache:
    """Keeps tensors in memory while they fit into a budget, and the others in files.

    Parameters
    ----------
    limit : int, optional
        Bytes in memory; None sets no limit.
    folder : Path, optional
        For the files, which are scratch: nothing is left of them when the cache is closed.  Needed with a limit.

    Attributes
    ----------
    resident_bytes, peak_bytes, spilled_bytes : int
        In memory now and at most so far; written to files so far.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        if limit is not None and folder is None:
            raise ValueError("an activation cache with a limit needs a folder")
        self._limit, self._folder = limit, folder
        self._numbers = itertools.count()
        self.resident_bytes = self.peak_bytes = self.spilled_bytes = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._clear(folder)

    def __enter__(self) -> "ActivationCache":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._folder is not None and self._folder.is_dir():
            self._clear(self._folder)
            self._folder.rmdir()

    def hold(self, tensor: Tensor, swap: bool = False) -> Held:
        """Keep a tensor, in memory or in a file.

        Parameters
        ----------
        tensor : Tensor
            Not to be changed while it is held.
        swap : bool
            Where it goes to a file, empty this very object, to which others still refer: they must not look at it
            before ``put_back``.
        """
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if self._limit is None or self.resident_bytes + nbytes <= self._limit:
            self._count(nbytes)
            return Held(tensor.detach(), nbytes, None)
        assert self._folder is not None
        path = self._folder / f"{next(self._numbers):08d}.bin"
        with storing(path):
            _bytes_of(storage).tofile(path)
        self.spilled_bytes += nbytes
        held = Held(tensor, nbytes, path)
        if swap:
            tensor.data = tensor.data.new_empty(0)
        else:
            held.tensor = None
        return held

    def put_back(self, held: Held) -> None:
        """Give a tensor that was swapped out its memory again; its file stays until ``drop``."""
        if held.path is not None and held.tensor is not None:
            held.tensor.data = self.get(held)
            held.tensor = None

    def get(self, held: Held) -> Tensor:
        """Give a tensor that is held, read from its file if it is in one."""
        if held.tensor is not None and held.path is None:
            if held.tensor._version != held.version:
                raise RuntimeError("the model changes hidden states in place after a block has received them")
            return held.tensor
        assert held.path is not None
        storage = torch.from_numpy(np.fromfile(held.path, dtype=np.uint8)).to(held.empty.device).untyped_storage()
        shape, stride, offset = held.layout
        return held.empty.new_empty(0).set_(storage, offset, shape, stride)

    def drop(self, held: Held) -> None:
        """Forget a tensor."""
        if held.path is not None:
            held.path.unlink(missing_ok=True)
        elif held.tensor is not None:
            self._count(-held.nbytes)
        held.tensor = held.path = None

    def _count(self, nbytes: int) -> None:
        self.resident_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.resident_bytes)

    @staticmethod
    def _clear(folder: Path) -> None:
        for path in folder.glob("*.bin"):
            path.unlink()


def _bytes_of(storage: Any) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu().numpy()
