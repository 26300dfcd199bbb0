"""The dictionary that fits several layers at once, each layer in its own metric.

For relative metrics ``M_l`` that sum to the identity, coefficients ``S_l`` and ``Z_l = M_l T_l``, where the ``T_l`` are
the targets, the minimum over A of

    sum_l tr( (T_l - A S_l)^T M_l (T_l - A S_l) )

solves the generalised Sylvester equation ``sum_l M_l A (S_l S_l^T) = sum_l Z_l S_l^T``.  Its operator is symmetric and
positive semidefinite, so conjugate gradients solve it for any number of layers by matrix products alone; for two layers
both sides can be diagonalised together, which gives a closed form (GeoPair states it for metrics that are not
normalised).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from array_api_compat import device

from cospadi.arrays import Array, namespace


@dataclass(frozen=True)
class Fit:
    """A dictionary and how it was reached.

    Attributes
    ----------
    dictionary : array, shape (in_features, n_atoms)
    steps : int
        Conjugate gradient steps; 0 for a closed form.
    residual : float
        Of the equation, relative to its right side, in the norm of the preconditioner's inverse.
    decrease : float
        By how much the sum of squares has fallen.
    """

    dictionary: Array
    steps: int
    residual: float
    decrease: float


def iterative_dictionary(
    metrics: Sequence[Array],
    products: Sequence[Array],
    codes: Sequence[Array],
    previous: Array,
    tolerance: float = 1e-3,
    max_steps: int = 20,
) -> Fit:
    """Solve for the dictionary by preconditioned conjugate gradients (Hestenes, Stiefel 1952).

    The preconditioner replaces every metric by its mean eigenvalue c_l, which leaves ``sum_l c_l S_l S_l^T`` on the
    right: one step is then exact when the metrics are multiples of each other.  Each step lowers the sum of squares, so
    that stopping early is safe.  Atoms that no layer uses, and whatever else the equation leaves open, keep their
    ``previous`` values.

    Parameters
    ----------
    metrics : sequence of array, shape (in_features, in_features)
        M_l, symmetric positive semidefinite; their sum is the identity.
    products : sequence of array, shape (in_features, out_features of the layer)
        Z_l.
    codes : sequence of array, shape (n_atoms, out_features of the layer)
        S_l.
    previous : array, shape (in_features, n_atoms)
        Where to start.
    tolerance : float
        Residual at which to stop.
    max_steps : int
        Largest number of steps.

    Returns
    -------
    Fit
    """
    xp = namespace(previous)
    grams = [S @ S.T for S in codes]
    right = _right_side(products, codes)
    inverse = _inverse_of_mean(metrics, grams)
    A = previous
    residual = right - _apply(metrics, grams, A)
    scale = float(xp.sum(right * (right @ inverse)))
    preconditioned = residual @ inverse
    energy = float(xp.sum(residual * preconditioned))
    direction, decrease, steps = preconditioned, 0.0, 0
    while steps < max_steps and energy > tolerance**2 * scale:
        image = _apply(metrics, grams, direction)
        curvature = float(xp.sum(direction * image))
        if curvature <= 0:  # only rounding is left
            break
        length = energy / curvature
        A = A + length * direction
        residual = residual - length * image
        decrease += length * energy
        preconditioned = residual @ inverse
        last, energy = energy, float(xp.sum(residual * preconditioned))
        direction = preconditioned + (energy / last) * direction
        steps += 1
    return Fit(A, steps, (max(energy, 0.0) / scale) ** 0.5 if scale > 0 else 0.0, decrease)


def closed_form_dictionary(
    metrics: Sequence[Array], products: Sequence[Array], codes: Sequence[Array], previous: Array
) -> Fit:
    """Solve for the dictionary of two layers exactly, by simultaneous diagonalisation in float64.

    As the metrics sum to the identity, they share their eigenvectors: ``M_1 = P diag(p) P^T`` and
    ``M_2 = P diag(1 - p) P^T``.  With ``S_1 S_1^T + S_2 S_2^T = K K^T`` the same holds for ``K^-1 S_l S_l^T K^-T`` with
    eigenvalues q and 1 - q, and the equation falls apart into numbers: each unknown is divided by
    ``p q + (1 - p) (1 - q)``.

    Parameters and result are those of ``iterative_dictionary``, for two layers.

    Raises
    ------
    ValueError
        There are not two layers.
    """
    if len(metrics) != 2:
        raise ValueError(f"the closed form is for two layers, got {len(metrics)}")
    xp = namespace(previous)
    first, second = (xp.astype(M, xp.float64) for M in metrics)
    exact_codes = [xp.astype(S, xp.float64) for S in codes]
    grams = [S @ S.T for S in exact_codes]
    start = xp.astype(previous, xp.float64)
    right = _right_side([xp.astype(Z, xp.float64) for Z in products], exact_codes)
    # Solved for the change, so that what the equation leaves open stays as it was.
    residual = right - _apply((first, second), grams, start)
    gram, sizes = _scaled_gram(grams[0] + grams[1])
    root = xp.linalg.inv(xp.linalg.cholesky(gram)) / sizes[None, :]  # K^-1
    p, P = xp.linalg.eigh((first + first.T) / 2)
    q, Q = xp.linalg.eigh(_symmetric(root @ grams[0] @ root.T))
    p, q = xp.clip(p, 0, 1)[:, None], xp.clip(q, 0, 1)[None, :]
    divisor = p * q + (1 - p) * (1 - q)
    floor = 64 * float(xp.finfo(xp.float64).eps)
    change = P.T @ residual @ (root.T @ Q)
    safe = xp.where(divisor > floor, divisor, xp.ones_like(divisor))
    change = P @ xp.where(divisor > floor, change / safe, xp.zeros_like(change)) @ (Q.T @ root)
    A = start + change
    left = right - _apply((first, second), grams, A)
    decrease = float(xp.sum(change * (residual + left)))
    scale = float(xp.sum((right @ root.T) ** 2))
    remaining = float(xp.sum((left @ root.T) ** 2))
    return Fit(xp.astype(A, previous.dtype), 0, (remaining / scale) ** 0.5 if scale > 0 else 0.0, decrease)


def _right_side(products: Sequence[Array], codes: Sequence[Array]) -> Array:
    right = products[0] @ codes[0].T
    for Z, S in zip(products[1:], codes[1:], strict=True):
        right = right + Z @ S.T
    return right


def _apply(metrics: Sequence[Array], grams: Sequence[Array], A: Array) -> Array:
    """Give sum_l M_l A B_l."""
    image = metrics[0] @ A @ grams[0]
    for M, B in zip(metrics[1:], grams[1:], strict=True):
        image = image + M @ A @ B
    return image


def _inverse_of_mean(metrics: Sequence[Array], grams: Sequence[Array]) -> Array:
    """Give the inverse of sum_l c_l B_l, c_l the mean eigenvalue of M_l, with a tiny ridge; unused atoms are apart."""
    xp = namespace(grams[0])
    mean = xp.zeros_like(grams[0], dtype=xp.float64)
    for M, B in zip(metrics, grams, strict=True):
        mean = mean + float(xp.linalg.trace(M)) / M.shape[0] * xp.astype(B, xp.float64)
    scaled, sizes = _scaled_gram(mean, 64 * float(xp.finfo(grams[0].dtype).eps))
    inverse = xp.linalg.inv(scaled) / (sizes[:, None] * sizes[None, :])
    return xp.astype(_symmetric(inverse), grams[0].dtype)


def _scaled_gram(gram: Array, ridge: float | None = None) -> tuple[Array, Array]:
    """Scale a Gram to a unit diagonal and add a ridge of a few roundings, so that it can be inverted.

    Returns
    -------
    scaled : array, shape (n_atoms, n_atoms)
        Positive definite; rows of unused atoms are those of the identity.
    sizes : array, shape (n_atoms,)
        ``gram`` is about ``sizes[:, None] * scaled * sizes[None, :]``.
    """
    xp = namespace(gram)
    energies = xp.linalg.diagonal(gram)
    used = energies > 0
    sizes = xp.sqrt(xp.where(used, energies, xp.ones_like(energies)))
    level = 64 * float(xp.finfo(gram.dtype).eps) if ridge is None else ridge
    extra = xp.where(used, xp.zeros_like(sizes), xp.ones_like(sizes)) + level
    identity = xp.eye(gram.shape[0], dtype=gram.dtype, device=device(gram))
    return _symmetric(gram) / (sizes[:, None] * sizes[None, :]) + extra[:, None] * identity, sizes


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2
