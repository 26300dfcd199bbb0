"""Layers whose features are correlated and of very different sizes, and errors in float64."""

import numpy as np
import torch

from cospadi.formats.quantization import GRIDS, dequantize


def correlated_gram(d, seed=0, tokens=None, decay=0.7):
    """A Gram of inputs with directions of falling energy and features of uneven size."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
    X = rng.standard_normal((8 * d if tokens is None else tokens, d)) * np.arange(1, d + 1.0) ** -decay @ directions.T
    X *= np.exp(rng.standard_normal(d))
    return torch.from_numpy(X.T @ X)


def weight_rows(n_rows, d, seed=0):
    return torch.from_numpy(np.random.default_rng(seed + 100).standard_normal((n_rows, d)) * 0.05)


def errors_of_rows(rows, rounded, grid, gram):
    """(w - q)^T G (w - q) of each row, the obvious way."""
    difference = rows.double() - dequantize(rounded[0], rounded[1], grid).double()
    return torch.einsum("ri,ij,rj->r", difference, gram.double(), difference)


def factorization(d, n, n_atoms, n_nonzero, seed=0):
    """L, Y, D, S: atoms of falling importance, each column on its own support, and a target close to their product."""
    rng = np.random.default_rng(seed)
    L = torch.linalg.cholesky(correlated_gram(d, seed) + 1e-3 * torch.eye(d, dtype=torch.float64))
    A = torch.from_numpy(np.linalg.qr(rng.standard_normal((d, max(d, n_atoms))).T)[0].T[:, :n_atoms].copy())
    A = A / A.norm(dim=0)
    S = torch.zeros(n_atoms, n, dtype=torch.float64)
    for j in range(n):
        S[torch.from_numpy(rng.permutation(n_atoms)[:n_nonzero].copy()), j] = torch.from_numpy(
            rng.standard_normal(n_nonzero)
        )
    S *= torch.arange(1, n_atoms + 1.0, dtype=torch.float64)[:, None] ** -1.0
    noise = torch.from_numpy(rng.standard_normal((d, n)))
    Y = A @ S + 0.01 * float((A @ S).norm()) / float(noise.norm()) * noise
    return L, Y, torch.linalg.solve_triangular(L.T, A, upper=True), S


NAMES = sorted(GRIDS)
COLUMN_GRIDS = [name for name in NAMES if GRIDS[name].group is None]
