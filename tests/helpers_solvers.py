"""Targets, and the table of solvers that the laws run over."""

from dataclasses import dataclass
from typing import ClassVar

import array_api_strict
import numpy as np
import torch

from cospadi.solvers.base import SOLVERS, Solution
from cospadi.solvers.ksvd import KSVD
from cospadi.whitening.problem import Problem

NAMES = [name for name in SOLVERS.names() if SOLVERS.availability(name)]
SPARSE = [name for name in NAMES if SOLVERS.get(name).sparse]
OVERCOMPLETE = [name for name in SPARSE if name != "orthogonal"]

# Few alternations: the laws hold after each one.
OPTIONS = {"ksvd-numpy": {"n_iter": 4}, "ksvd-torch": {"n_iter": 4}, "mod": {"n_iter": 4}, "spams": {"n_iter": 4}}


def solver(name):
    return SOLVERS.create(name, OPTIONS.get(name))


def whitened_like(d, n, seed=0, decay=0.6, dtype=np.float64):
    """A low-rank-plus-noise target: directions of falling energy, as whitening leaves them."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((d, d)))[0]
    energies = np.arange(1, d + 1.0) ** -decay
    return np.ascontiguousarray(((directions * energies) @ rng.standard_normal((d, n))).astype(dtype))


def planted(d, n, n_atoms, n_nonzero, seed=0):
    """A target that is exactly sparse in a random dictionary; gives the target and the dictionary."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((d, n_atoms))
    A /= np.linalg.norm(A, axis=0)
    S = np.zeros((n_atoms, n))
    for j in range(n):
        S[rng.permutation(n_atoms)[:n_nonzero], j] = rng.uniform(1, 2, n_nonzero) * rng.choice([-1, 1], n_nonzero)
    return A @ S, A


def unit(A):
    return A / np.linalg.norm(A, axis=0)


def solve(name, target, n_atoms, n_nonzero, **given):
    """Solve by registry name; dense solvers get n_nonzero = n_atoms."""
    if not SOLVERS.get(name).sparse:
        n_nonzero = n_atoms
    return solver(name).solve(Problem(target, n_atoms, n_nonzero, **given))


def product(solution: Solution) -> np.ndarray:
    return np.asarray(solution.dictionary) @ np.asarray(solution.coefficients)


def error(target, solution) -> float:
    """Relative functional error in float64."""
    target = np.asarray(target, np.float64)
    return float(np.linalg.norm(target - product(solution)) / (np.linalg.norm(target) or 1.0))


@dataclass(frozen=True, kw_only=True)
class StrictKSVD(KSVD):
    """K-SVD that computes with the given library, even with one that allows nothing beyond the standard."""

    library: ClassVar[str | None] = None


def as_library(array, library):
    if library == "torch":
        return torch.from_numpy(np.array(array))
    return array_api_strict.asarray(array) if library == "strict" else np.asarray(array)
