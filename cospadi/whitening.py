"""From the Gram of the inputs to the whitened problem and back.

With ``G = X^T X = L L^T`` the output error ``||X (W - D S)||_F^2`` equals ``||Y - A S||_F^2`` for ``Y = L^T W`` and
``A = L^T D``: ordinary dictionary learning (arXiv 2509.22075, section 3.1).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError

_MAX_CONDITION = 1e7
"""Largest ratio of the factor's extreme diagonal entries: beyond it D = L^-T A loses the precision of bfloat16."""
_LARGEST = float(torch.finfo(torch.float32).max) ** 0.5
"""Largest norm of a whitened weight: the products of two such matrices are finite in float32."""


@dataclass(frozen=True)
class Whitening:
    """A square root of a Gram.

    Attributes
    ----------
    factor : Tensor, shape (in_features, in_features), float64
        Lower Cholesky factor L of the (damped) Gram.
    damping : float
        What was added to the Gram's diagonal, as a fraction of its mean; 0 if nothing was.
    note : str
        What was wrong with the Gram, for the report; empty if nothing.
    name : str
        Layer name, for error texts.
    """

    factor: Tensor
    damping: float = 0.0
    note: str = ""
    name: str = ""

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
    mean = float(gram.diagonal().mean())
    if mean <= 0:
        seen = "no calibration token reached the layer" if n_tokens == 0 else "all calibration inputs are zero"
        return Whitening(
            torch.eye(size, dtype=gram.dtype, device=gram.device),
            1.0,
            f"{seen}: the plain weight error is minimised instead",
            name,
        )
    factor = _cholesky(gram)
    if factor is not None:
        return Whitening(factor, name=name)
    note = f"only {n_tokens} tokens for {size} features" if n_tokens < size else "the Gram is close to singular"
    zeros = int((gram.diagonal() == 0).sum())
    if zeros:
        note = f"{zeros} input features are always zero"
    level = damping
    while level <= 0.1:
        damped = gram.clone()
        damped.diagonal().add_(level * mean)
        factor = _cholesky(damped)
        if factor is not None:
            return Whitening(factor, level, note, name)
        level *= 10
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(damping * mean).sqrt()
    upper = torch.linalg.qr(root.T).R
    lower = (upper * upper.diagonal().sign()[:, None]).T.contiguous()
    return Whitening(lower, damping, f"{note}; eigenvalues clamped", name)


def output_errors(gram: Tensor, weight: Tensor, approximation: Tensor) -> tuple[float, float]:
    """Give ``||X (W - V)||_F^2`` and ``||X W||_F^2`` from the Gram of X, in float64.

    Parameters
    ----------
    gram : Tensor, shape (in_features, in_features)
        ``X^T X``, undamped; a Gram of zeros (no token seen) counts as the identity.
    weight, approximation : Tensor, shape (in_features, out_features)
        W and V.
    """
    weight = weight.to(gram)
    difference = weight - approximation.to(gram)
    if not bool(gram.any()):
        return float(difference.square().sum()), float(weight.square().sum())
    # Where the Gram is singular, rounding may leave a sum of squares slightly below zero.
    lost, norm = (max(float((one * (gram @ one)).sum()), 0.0) for one in (difference, weight))
    return lost, norm


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


def sequential_errors(
    gram: Tensor, shift: Tensor, drift: Tensor, weight: Tensor, approximation: Tensor
) -> tuple[float, float]:
    """Give ``||X W - X~ V||_F^2`` and ``||X W||_F^2``, in float64, with X~ the inputs behind a compressed prefix.

    Parameters
    ----------
    gram, shift, drift : Tensor, shape (in_features, in_features)
        ``X~^T X~``, ``X~^T (X - X~)`` and ``(X - X~)^T (X - X~)``; a Gram of zeros (no token seen) counts as the
        identity.
    weight, approximation : Tensor, shape (in_features, out_features)
        W and V.
    """
    squared, scale = output_errors(gram, weight, approximation)
    weight = weight.to(gram)
    difference = weight - approximation.to(gram)
    carried = float((weight * (drift @ weight)).sum())
    turned = shift @ weight
    # Rounding may leave a sum of squares that cancel slightly below zero.
    return (
        max(squared + 2 * float((difference * turned).sum()) + carried, 0.0),
        max(scale + 2 * float((weight * turned).sum()) + carried, 0.0),
    )


def _cholesky(gram: Tensor) -> Tensor | None:
    """Give the lower factor, or None when the matrix is not positive definite or badly conditioned."""
    factor, info = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if int(info) != 0 or float(diagonal.max()) > _MAX_CONDITION * float(diagonal.min()):
        return None
    return factor
