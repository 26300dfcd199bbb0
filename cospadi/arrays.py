"""Arrays of numpy, torch and cupy: which library holds one, and moves between them.

The dictionary solvers are written once against the array API (https://data-apis.org/array-api).
"""

import importlib.util
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
import torch

from cospadi.errors import UnavailableError, UsageError
from cospadi.registry import Availability

Array: TypeAlias = Any
"""An array of any library that follows the array API."""


def namespace(*arrays: Array) -> Any:
    """Give the array-API namespace that the arrays share."""
    return array_api_compat.array_namespace(*arrays)


def library_of(array: Array) -> str:
    """Name the library of an array: ``numpy``, ``torch``, ``cupy`` or ``array_api_strict``."""
    if array_api_compat.is_torch_array(array):
        return "torch"
    if isinstance(array, np.ndarray):
        return "numpy"
    if array_api_compat.is_cupy_array(array):
        return "cupy"
    return array_api_compat.array_namespace(array).__name__.split(".")[0]


def on_cpu(array: Array) -> bool:
    """Tell whether an array lies in the memory of the host."""
    if array_api_compat.is_torch_array(array):
        return array.device.type == "cpu"
    return library_of(array) != "cupy"


def convert(array: Array, library: str) -> Array:
    """Give an array of the named library with the same numbers, sharing memory where that is possible.

    Parameters
    ----------
    array : array
        Of numpy, torch, cupy or array_api_strict.
    library : str
        ``numpy``, ``torch`` or ``cupy``.

    Raises
    ------
    UnavailableError
        cupy was asked for and cannot run here.
    """
    source = library_of(array)
    if source == library:
        return array
    if source == "torch":
        array = array.detach()
    if library == "numpy":
        if source == "cupy":
            return array.get()
        return array.cpu().numpy() if source == "torch" else np.asarray(array)
    if library == "torch":
        import torch
        from torch.utils.dlpack import from_dlpack

        if source == "cupy":
            return from_dlpack(array)
        return torch.from_numpy(np.ascontiguousarray(array))
    if library == "cupy":
        state = cupy_availability()
        if not state:
            raise UnavailableError(state.reason)
        import cupy

        if source == "torch" and array.is_cuda:
            return cupy.from_dlpack(array)
        return cupy.asarray(convert(array, "numpy"))
    raise ValueError(f"unknown array library {library!r}")


def cupy_availability() -> Availability:
    """Tell whether cupy is installed and finds a GPU, without starting CUDA when it is not installed."""
    if importlib.util.find_spec("cupy") is None:
        return Availability(False, "cupy is not installed: pip install 'cospadi[cupy]' on a machine with an NVIDIA GPU")
    import cupy

    if not cupy.cuda.is_available():
        return Availability(False, "cupy finds no CUDA GPU on this machine: choose a numpy or torch variant")
    return Availability(True)


def cuda_availability() -> Availability:
    """Tell whether torch finds a CUDA GPU."""
    import torch

    if not torch.cuda.is_available():
        return Availability(False, "torch finds no CUDA GPU on this machine")
    return Availability(True)


def product(left: Array, right: Array) -> Array:
    """Give the matrix product of two torch tensors; on the CPU by numpy's BLAS, which was 1.3 to 2 times as fast."""
    if on_cpu(left):
        return convert(convert(left, "numpy") @ convert(right, "numpy"), "torch")
    return left @ right


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Give the eigenvalues of a symmetric matrix, in rising order, and its eigenvectors as columns.

    The matrix may be overwritten: numpy's own function takes two more copies of it.
    """
    if library_of(matrix) == "numpy":
        from scipy.linalg import eigh as lapack

        values, vectors = lapack(matrix.T, overwrite_a=True, check_finite=False, driver="evd")
        return values, vectors
    found = namespace(matrix).linalg.eigh(matrix)
    return found[0], found[1]


def dtype_name(dtype: torch.dtype) -> str:
    """Give the name of a dtype without the name of its library, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def torch_device(name: str) -> torch.device:
    """Give the device of a name; ``auto`` is a GPU where there is one.

    Raises
    ------
    UsageError
        There is no such device.
    UnavailableError
        Torch finds no such GPU here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"unknown device {name!r}: expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UnavailableError(f"device {name!r} cannot be used: torch finds {found} CUDA GPUs on this machine")
    return device
