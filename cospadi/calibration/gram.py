"""The Gram matrix of a layer's inputs, summed over tokens."""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cospadi.errors import CheckpointError, NumericalError

_PIECE = 1 << 21
"""Elements that are added at a time."""


class Gram:
    """The uncentred Gram ``G = X^T X`` of a layer's inputs, summed over batches.

    Products are taken in float32 (in float64 for float64 inputs), batch by batch, and summed in float64.  Grams are
    additive: those of several workers merge into the Gram of all their tokens.

    Parameters
    ----------
    name : str
        Layer name, for error texts.
    in_features : int
        Width of the inputs.
    device : torch.device, optional
        Where the sum is kept.

    Attributes
    ----------
    matrix : Tensor, shape (in_features, in_features), float64
        The sum so far.
    n_tokens : int
        Rows of X so far.
    """

    def __init__(self, name: str, in_features: int, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.matrix = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.n_tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Add inputs of shape (..., in_features).

        Raises
        ------
        NumericalError
            The inputs hold NaN or infinity, or overflow float32 when squared.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)
        if rows.device.type == "cpu":
            # numpy sees that both factors are one matrix and computes half of the product (BLAS syrk).
            x = rows.numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                product = torch.from_numpy(np.matmul(x.T, x))
        else:
            product = rows.T @ rows
        if not bool(torch.isfinite(product.diagonal()).all()):
            raise NumericalError(f"{self.name}: the calibration activations hold NaN, infinity or overflow float32")
        # In pieces: torch turns the whole of a float32 summand to float64 before it adds.
        step = max(1, _PIECE // max(1, product.shape[1]))
        for start in range(0, len(product), step):
            self.matrix[start : start + step] += product[start : start + step]
        self.n_tokens += rows.shape[0]

    def merge(self, other: "Gram") -> None:
        """Add the Gram of other tokens of the same layer."""
        if other.matrix.shape != self.matrix.shape:
            raise ValueError(
                f"{self.name}: cannot merge Grams of {self.matrix.shape[0]} and {other.matrix.shape[0]} features"
            )
        self.matrix += other.matrix.to(self.matrix.device)
        self.n_tokens += other.n_tokens

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        tensors = {"gram": self.matrix.cpu(), "n_tokens": torch.tensor([self.n_tokens])}
        save_file(tensors, path, metadata={"name": self.name})

    @classmethod
    def load(cls, path: str | Path, name: str = "") -> "Gram":
        """Read what ``save`` wrote.

        Raises
        ------
        CheckpointError
            The file is missing or is not a saved Gram.
        """
        try:
            tensors = load_file(path)
            matrix, n_tokens = tensors["gram"], int(tensors["n_tokens"].item())
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a saved Gram ({error})") from error
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.dtype != torch.float64 or n_tokens < 0:
            raise CheckpointError(f"{path}: not a saved Gram (shape {tuple(matrix.shape)}, {matrix.dtype})")
        gram = cls(name or str(path), 0)
        gram.matrix, gram.n_tokens = matrix, n_tokens
        return gram


def fold(matrix: Tensor) -> Tensor:
    """Give the lower half of a symmetric matrix, shape (d, d), as one of d + 1 rows and half as many columns.

    The two triangles on the diagonal share the first rows, one in each half (as in LAPACK's rectangular full packed
    storage); the square below the diagonal follows.

    Returns
    -------
    Tensor, shape (d + 1, (d + 1) // 2), dtype of the matrix
    """
    d = len(matrix)
    half, rest = (d + 1) // 2, d // 2
    folded = torch.empty(d + 1, half, dtype=matrix.dtype)
    folded[0], folded[1 : half + 1] = 0, matrix[:half, :half].tril()
    folded[:rest, half - rest :] += matrix[half:, half:].tril().T
    folded[half + 1 :] = matrix[half:, :half]
    return folded


def unfold(folded: Tensor, size: int) -> Tensor:
    """Give the symmetric matrix, shape (size, size), that ``fold`` was given.

    Raises
    ------
    ValueError
        The shape is another.
    """
    half, rest = (size + 1) // 2, size // 2
    if tuple(folded.shape) != (size + 1, half):
        raise ValueError(f"half a matrix of {size} rows has shape {tuple(folded.shape)}")
    matrix = torch.empty(size, size, dtype=folded.dtype)
    for triangle, corner in (
        (folded[1 : half + 1].tril(), matrix[:half, :half]),
        (folded[:rest, half - rest :].triu().T, matrix[half:, half:]),
    ):
        corner.copy_(triangle)
        corner += triangle.tril(-1).T
    matrix[half:, :half] = folded[half + 1 :]
    matrix[:half, half:] = folded[half + 1 :].T
    return matrix
