"""Statistics of sequential calibration: the Gram of a layer's inputs, and their difference from the dense model's."""

import torch
from torch import Tensor

from cospadi.calibration.gram import Gram
from cospadi.errors import NumericalError


class CrossGram:
    """Statistics of the inputs that a layer receives behind a compressed prefix (X~) and in the dense model (X).

    Kept is ``X~^T (X - X~)`` and not ``X~^T X``: the difference of two large sums would drown in their rounding, which
    the inverse of a badly conditioned Gram then blows up.  Where both inputs are equal it is exactly zero.

    Parameters
    ----------
    name : str
        Layer name, for error texts.
    in_features : int
        Width of the inputs.
    device : torch.device, optional
        Where the sums are kept.

    Attributes
    ----------
    gram : Gram
        ``X~^T X~``.
    shift : Tensor, shape (in_features, in_features), float64, or None
        ``X~^T (X - X~)``; None when there is no dense model or its rows do not correspond.
    note : str
        Why what was asked for is missing, for the report; empty if nothing is.
    """

    def __init__(self, name: str, in_features: int, device: torch.device | str = "cpu") -> None:
        self.gram = Gram(name, in_features, device)
        self.shift: Tensor | None = None
        self.note = ""
        self._given_up = False

    @property
    def n_tokens(self) -> int:
        """Rows of X~."""
        return self.gram.n_tokens

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs of the same tokens in both models.

        Parameters
        ----------
        inputs, dense : Tensor, shape (..., in_features), floating
            X~ and X; not modified.  X is ignored after ``give_up``.

        Raises
        ------
        NumericalError
            The inputs hold NaN or infinity, or overflow float32 when squared.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        rows = rows if rows.dtype == torch.float64 else rows.to(torch.float32)  # as the Gram does
        self.gram.add(rows)
        if dense is None or self._given_up:
            return
        away = dense.detach().reshape(rows.shape).to(rows) - rows
        product = rows.T @ away
        if not bool(torch.isfinite(product).all()):
            raise NumericalError(
                f"{self.gram.name}: the dense model's calibration activations hold NaN, infinity or overflow float32"
            )
        if self.shift is None:
            self.shift = torch.zeros_like(self.gram.matrix)
        self.shift += product

    def give_up(self, note: str) -> None:
        """Drop what was collected of the dense model, and say why."""
        self.shift = None
        self._given_up = True
        self.note = note
