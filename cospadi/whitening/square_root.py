"""From the Gram of the inputs to the whitened problem and back.

With ``G = X^T X = L L^T`` the output error ``||X (W - D S)||_F^2`` equals ``||Y - A S||_F^2`` for ``Y = L^T W`` and
``A = L^T D``: ordinary dictionary learning (arXiv 2509.22075, section 3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from cospadi.arrays import product
from cospadi.errors import NumericalError, UsageError

_MAX_CONDITION = 1e7
"""Largest ratio of the factor's extreme diagonal entries: beyond it D = L^-T A loses the precision of bfloat16."""
_COLUMNS = 256
"""Columns of a weight whose errors are computed at a time."""
_LARGEST = float(torch.finfo(torch.float32).max) ** 0.5
"""Largest norm of a whitened weight: the products of two such matrices are finite in float32."""


@dataclass(frozen=True)
class Whitening:
    """A square root of a Gram.

    Attributes
    ----------
    gram : Tensor, shape (in_features, in_features), float64
        As it was given, undamped.
    damping : float
        What is added to the Gram's diagonal, as a fraction of its mean; 0 if nothing is.
    note : str
        What was wrong with the Gram, for the report; empty if nothing.
    name : str
        Layer name, for error texts.
    root : {"cholesky", "eigenvalues", "identity"}
        Of the damped Gram; of the Gram with its eigenvalues clamped; or of no Gram at all.
    """

    gram: Tensor
    damping: float = 0.0
    note: str = ""
    name: str = ""
    root: Literal["cholesky", "eigenvalues", "identity"] = "cholesky"

    @cached_property
    def factor(self) -> Tensor:
        """The lower Cholesky factor L, shape (in_features, in_features), float64; kept until ``forget``."""
        if self.root == "cholesky":
            return torch.linalg.cholesky(self.metric)
        if self.root == "identity":
            return torch.eye(len(self.gram), dtype=self.gram.dtype, device=self.gram.device)
        values, vectors = torch.linalg.eigh(self.gram)
        root = vectors * values.clamp_min(self.damping * _mean(self.gram)).sqrt()
        upper = torch.linalg.qr(root.T).R
        return (upper * upper.diagonal().sign()[:, None]).T.contiguous()

    @property
    def metric(self) -> Tensor:
        """What the factor is a root of, L L^T, float64; the Gram itself where nothing was repaired."""
        if self.root == "cholesky":
            return self.gram if self.damping == 0 else _damped(self.gram, self.damping)
        return product(self.factor, self.factor.T)

    def forget(self) -> None:
        """Free the factor; who asks for it again computes it again, to the same bits."""
        self.__dict__.pop("factor", None)

    def whiten(self, weight: Tensor) -> Tensor:
        """Give Y = L^T W, float64, from W of shape (in_features, out_features).

        Raises
        ------
        NumericalError
            Y is NaN or infinite, or so large that solvers, which multiply in float32, would overflow.
        """
        whitened = self.factor.T @ weight.to(self.factor)
        if not float(whitened.norm()) < _LARGEST:
            raise NumericalError(f"{self.name}: the weight times its calibration inputs overflows float32")
        return whitened

    def unwhiten(self, dictionary: Tensor) -> Tensor:
        """Give D = L^-T A, float64, from A of shape (in_features, n_atoms)."""
        return torch.linalg.solve_triangular(self.factor.T, dictionary.to(self.factor), upper=True)


def whitening_from_gram(gram: Tensor, n_tokens: int, damping: float = 1e-6, name: str = "") -> Whitening:
    """Factorise a Gram, repairing it visibly where it has to be.

    The plain Cholesky factor is taken when it exists and is well conditioned.  Else ``damping`` times the mean of the
    diagonal is added, and ten times more until it works; eigenvalues clamped from below are the last resort.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features), floating
        ``X^T X``.
    n_tokens : int
        Rows of X.
    damping : float
        First damping to try, relative to the mean of the diagonal.
    name : str
        Layer name, for error texts.

    Raises
    ------
    NumericalError
        The Gram holds NaN or infinity.
    """
    gram = gram.to(torch.float64)
    if not bool(torch.isfinite(gram).all()):
        raise NumericalError(f"{name}: the Gram of the calibration activations holds NaN or infinity")
    size = gram.shape[0]
    mean = _mean(gram)
    if mean <= 0:
        seen = "no calibration token reached the layer" if n_tokens == 0 else "all calibration inputs are zero"
        return Whitening(gram, 1.0, f"{seen}: the plain weight error is minimised instead", name, "identity")
    found = _factorized(Whitening(gram, name=name))
    if found is not None:
        return found
    note = f"only {n_tokens} tokens for {size} features" if n_tokens < size else "the Gram is close to singular"
    zeros = int((gram.diagonal() == 0).sum())
    if zeros:
        note = f"{zeros} input features are always zero"
    level = damping
    while level <= 0.1:
        found = _factorized(Whitening(gram, level, note, name))
        if found is not None:
            return found
        level *= 10
    return Whitening(gram, damping, f"{note}; eigenvalues clamped", name, "eigenvalues")


def column_errors(gram: Tensor, difference: Callable[[slice], Tensor], n_columns: int) -> Tensor:
    """Give ``||X e||^2`` of each column e of a matrix, shape (n_columns,), float64, from the Gram of X.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features), float64
        ``X^T X``, undamped; a Gram of zeros (no token seen) counts as the identity.
    difference : callable (slice)
        Gives a range of the columns, in float64: the whole need not be in memory.
    n_columns : int
    """
    seen = bool(gram.any())
    found = torch.empty(n_columns, dtype=gram.dtype, device=gram.device)
    for start in range(0, n_columns, _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        part = difference(columns)
        found[columns] = (part * (product(gram, part) if seen else part)).sum(0)
    return found


def output_errors(gram: Tensor, weight: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Give ``||X (W - V)||_F^2`` and ``||X W||_F^2`` from the Gram of X, in float64.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features)
        ``X^T X``, undamped; a Gram of zeros (no token seen) counts as the identity.
    weight, approximation : Tensor, shape (in_features, out_features)
        W and V.
    """
    n = weight.shape[1]
    lost = column_errors(gram, lambda at: weight[:, at].to(gram) - approximation[:, at].to(gram), n)
    norm = column_errors(gram, lambda at: weight[:, at].to(gram), n)
    # Where the Gram is singular, rounding may leave a sum of squares slightly below zero.
    return max(float(lost.sum()), 0.0), max(float(norm.sum()), 0.0)


def corrected_weight(
    weight: Tensor, whitening: Whitening, shift: Tensor, alpha: float = 1.0, ridge: float = 1e-2
) -> Tensor:
    """Give the weight that imitates the dense outputs from the inputs behind a compressed prefix.

    With inputs X in the dense model and X~ behind the prefix, ``W' = W + alpha * (X~^T X~)^-1 X~^T (X - X~) W``
    minimises ``alpha ||X W - X~ W'||_F^2 + (1 - alpha) ||X~ W - X~ W'||_F^2``, and for any D S in place of W' that sum
    differs from ``||X~ (W' - D S)||_F^2`` by a constant: the ordinary problem with W' for W remains.

    The fit alone follows the noise of the calibration tokens where the inputs hardly vary, with weights many times
    those of W that no compression keeps.  The ridge adds ``ridge * mean(diag(X~^T X~)) * ||W' - W||_F^2`` to the sum.

    Parameters
    ----------
    weight : Tensor, shape (in_features, out_features)
        W; not modified.
    whitening : Whitening
        Of the Gram of X~; its note says what had to be repaired, and its damping adds to the ridge.
    shift : Tensor, shape (in_features, in_features)
        ``X~^T (X - X~)``; zero gives W.
    alpha : float
        0 keeps the layer's own weight, 1 imitates the dense outputs.
    ridge : float
        How strongly W' is held to W; 0 for the plain fit.

    Returns
    -------
    Tensor, shape (in_features, out_features), float64

    Raises
    ------
    UsageError
        alpha is not between 0 and 1, or the ridge is negative.
    NumericalError
        The shift holds NaN or infinity.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha={alpha}: expected 0 (the layer's own weight) to 1 (the dense outputs)")
    if not 0 <= ridge < float("inf"):
        raise UsageError(f"ridge={ridge}: expected a number from 0 (the plain fit) up")
    factor = whitening.factor
    weight = weight.to(factor)
    if alpha == 0:
        return weight
    if not bool(torch.isfinite(shift).all()):
        raise NumericalError("the shift of the calibration activations holds NaN or infinity")
    if ridge > 0:
        gram = factor @ factor.T
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        factor = torch.linalg.cholesky(gram)
    return weight + alpha * torch.cholesky_solve(shift.to(factor) @ weight, factor)


def _factorized(whitening: Whitening) -> Whitening | None:
    """Give it with its factor, or None when the matrix is not positive definite or badly conditioned."""
    factor, info = torch.linalg.cholesky_ex(whitening.metric)
    diagonal = factor.diagonal()
    if int(info) != 0 or float(diagonal.max()) > _MAX_CONDITION * float(diagonal.min()):
        return None
    whitening.__dict__["factor"] = factor
    return whitening


def _mean(gram: Tensor) -> float:
    return float(gram.diagonal().mean())


def _damped(gram: Tensor, level: float) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(level * _mean(gram))
    return damped
