"""Layers with inputs of their own, in coordinates in which their Grams sum to the identity.

One QR decomposition of the stacked square roots, ``[w_l^1/2 L_l^T] = [R_l] L^T`` with ``G_l = L_l L_l^T``, gives a
factor L of ``sum_l w_l G_l`` and relative roots R_l with ``sum_l R_l^T R_l = I``.  With ``A = L^T D`` and
``T_l = L^T W_l`` a layer's error is

    w_l ||L_l^T (W_l - D S_l)||^2 = ||R_l (T_l - A S_l)||^2 = ||Y_l - R_l A S_l||^2.

However badly the Grams are conditioned, the relative metrics ``M_l = R_l^T R_l`` have eigenvalues between 0 and 1.
"""

from dataclasses import dataclass

import numpy as np

from cospadi.arrays import Array, convert, library_of, namespace, on_cpu
from cospadi.errors import NumericalError, UsageError


@dataclass(frozen=True)
class SharedProblem:
    """Layers of equal input width that are to share a dictionary.

    Layers that receive the very same input have one metric and belong side by side in one entry.

    Attributes
    ----------
    weights : tuple of array, shape (in_features, out_features of the entry), floating
        W_l.  Never modified.
    factors : tuple of array, shape (in_features, in_features), float64
        L_l, any square root of the entry's Gram ``G_l = L_l L_l^T`` (``Whitening.factor``), not singular.
    n_atoms, n_nonzero : int
        Sizes of the dictionary and of a column's support, as in ``Problem``.
    column_weights : tuple of array, shape (out_features of the entry,), optional
        f_l, not negative.
    layer_weights : tuple of float, optional
        w_l, positive; 1 if not given.
    seed : int
        Seed of whatever is random in the start.
    """

    weights: tuple[Array, ...]
    factors: tuple[Array, ...]
    n_atoms: int
    n_nonzero: int
    column_weights: tuple[Array, ...] | None = None
    layer_weights: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        shapes = [tuple(W.shape) for W in self.weights]
        if not shapes or any(len(shape) != 2 or 0 in shape or shape[0] != shapes[0][0] for shape in shapes):
            raise UsageError(f"layers that share a dictionary need weights of equal input width, got shapes {shapes}")
        square = (shapes[0][0], shapes[0][0])
        factors = [tuple(L.shape) for L in self.factors]
        if factors != [square] * len(shapes):
            raise UsageError(f"{len(shapes)} layers need as many factors of shape {square}, got {factors}")
        if self.n_atoms < 1 or not 0 <= self.n_nonzero <= self.n_atoms:
            raise UsageError(f"n_atoms={self.n_atoms}, n_nonzero={self.n_nonzero}: expected 0 <= n_nonzero <= n_atoms")
        if self.column_weights is not None:
            given = [tuple(f.shape) for f in self.column_weights]
            if given != [shape[1:] for shape in shapes]:
                raise UsageError(f"column_weights of shapes {given} for weights of shapes {shapes}")
        if self.layer_weights is not None and (
            len(self.layer_weights) != len(shapes) or not all(0 < w < float("inf") for w in self.layer_weights)
        ):
            raise UsageError(
                f"layer_weights={self.layer_weights}: expected {len(shapes)} positive numbers, one for each layer"
            )


@dataclass(frozen=True)
class RelativeLayer:
    """One layer in these coordinates, with all weights folded in; arrays in the dtype of the computation.

    Attributes
    ----------
    target : array, shape (in_features, out_features)
        Y = R T.
    root : array, shape (in_features, in_features)
        R.
    metric : array, shape (in_features, in_features)
        M = R^T R.
    product : array, shape (in_features, out_features)
        Z = M T.
    averaged : array, shape (in_features, out_features)
        ``share^1/2 T``: the target if the metric were a multiple of the identity.
    share : float
        The mean eigenvalue of M.
    column_scales : array, shape (out_features,)
        What each column was multiplied by, to be divided out of S.
    """

    target: Array
    root: Array
    metric: Array
    product: Array
    averaged: Array
    share: float
    column_scales: Array

    def squared_error(self, A: Array, S: Array) -> float:
        """Give ||Y - R A S||^2 from the residual itself."""
        residual = self.target - (self.root @ A) @ S
        return _energy(residual)

    @property
    def squared_target(self) -> float:
        """Give ||Y||^2."""
        return _energy(self.target)


def relative_layers(problem: SharedProblem) -> tuple[list[RelativeLayer], Array]:
    """Check a problem and take it to the coordinates in which the Grams sum to the identity.

    Returns
    -------
    layers : list of RelativeLayer
        Float64 if the weights are, else float32; numpy arrays for tensors on the CPU.
    upper : array, shape (in_features, in_features), float64
        L^T, which takes D to A.

    Raises
    ------
    NumericalError
        The weights or the factors hold NaN or infinity, a column weight is negative, or a factor is singular.
    """
    weights, factors, columns = _checked(problem)
    given, xp = problem.weights[0], namespace(*weights)
    layer_weights = problem.layer_weights or (1.0,) * len(weights)
    # The mean square of a layer's weighted columns is taken out and counts as the layer's weight: the larger they are,
    # the more its metric decides about the dictionary, and so it should about the mean metric.
    squares = [float(xp.mean(W * W * f[None, :])) or float(xp.mean(f)) for W, f in zip(weights, columns, strict=True)]
    stacked = xp.concat(
        [(w * square) ** 0.5 * L.T for w, square, L in zip(layer_weights, squares, factors, strict=True)], axis=0
    )
    Q, upper = xp.linalg.qr(stacked)
    pivots = xp.abs(xp.linalg.diagonal(upper))
    if not float(xp.min(pivots)) > float(xp.max(pivots)) * 1e-15:
        raise NumericalError("the factors of the Grams are singular: damp the Grams")
    d = upper.shape[0]
    dtype = xp.float64 if namespace(given).isdtype(given.dtype, namespace(given).float64) else xp.float32
    layers = []
    for index, (W, f, square) in enumerate(zip(weights, columns, squares, strict=True)):
        R = Q[index * d : (index + 1) * d, :]
        scales = xp.sqrt(f / square)
        T = (upper @ W) * scales[None, :]
        M, Y = R.T @ R, R @ T
        share = float(xp.linalg.trace(M)) / d
        layers.append(
            RelativeLayer(
                target=xp.astype(Y, dtype),
                root=xp.astype(R, dtype),
                metric=xp.astype(M, dtype),
                product=xp.astype(R.T @ Y, dtype),
                averaged=xp.astype(share**0.5 * T, dtype),
                share=share,
                column_scales=xp.astype(scales, dtype),
            )
        )
    return layers, upper


def _checked(problem: SharedProblem) -> tuple[list[Array], list[Array], list[Array]]:
    """Give the weights, the factors and the column weights in float64, in the library that computes."""
    given = problem.weights[0]
    library = "numpy" if library_of(given) == "torch" and on_cpu(given) else library_of(given)
    weights = [_exact(W, library) for W in problem.weights]
    factors = [_exact(L, library) for L in problem.factors]
    xp = namespace(*weights)
    columns = [xp.ones_like(W[0, :]) for W in weights]
    if problem.column_weights is not None:
        columns = [_exact(f, library) for f in problem.column_weights]
    if not all(bool(xp.all(xp.isfinite(array))) for array in (*weights, *factors, *columns)):
        raise NumericalError("the weights, the factors or the column weights hold NaN or infinity")
    if any(bool(xp.any(f < 0)) for f in columns):
        raise NumericalError("the column weights must not be negative")
    # A floor keeps columns that the loss ignores solvable: the scale is divided out of S afterwards.
    floor = max(max(float(xp.max(f)) for f in columns) * 1e-12, float(np.finfo(np.float32).tiny))
    return weights, factors, [xp.clip(f, floor, None) for f in columns]


def _energy(array: Array) -> float:
    xp = namespace(array)
    return float(xp.sum(array * array, dtype=xp.float64))


def _exact(array: Array, library: str) -> Array:
    """Give the numbers in float64 in the named library; numpy has no bfloat16, so a tensor is widened first."""
    if library_of(array) == "torch":
        array = array.detach().double()
    array = convert(array, library)
    return namespace(array).astype(array, namespace(array).float64)
