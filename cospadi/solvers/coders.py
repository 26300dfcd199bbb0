"""Sparse coding: the coefficients for a dictionary that is given.

A coder solves, for each column y of the target, min ||y - A s||^2 with at most ``n_nonzero`` non-zeros in s, as far as
its method can.  Learners such as K-SVD and MOD take any coder.
"""

import abc
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from cospadi.arrays import Array, convert, library_of, namespace, on_cpu
from cospadi.errors import UnavailableError, UsageError
from cospadi.registry import nearest
from cospadi.solvers.conjugate_gradients import conjugate_gradients
from cospadi.solvers.updates import hard_threshold

PIVOT_ROUNDINGS = 100
"""An atom is dependent when its squared distance to the chosen ones is within this many units of rounding of zero."""
NOISE_ROUNDINGS = 8
"""A column is reproduced when no correlation exceeds this many units of rounding of its first one."""


@dataclass(frozen=True)
class Coding:
    """Coefficients, and how many columns could not use all their non-zeros.

    Attributes
    ----------
    coefficients : array, shape (n_atoms, n_columns)
        Zeros outside the support.
    dependent_columns : int
        Columns that ended early because the next atom depends linearly on the chosen ones.
    """

    coefficients: Array
    dependent_columns: int = 0


class Coder(abc.ABC):
    """Base of the sparse coders: frozen dataclasses whose fields are their options.

    Laws: at most ``n_nonzero`` non-zeros per column; finite for zero, equal and dependent atoms; the arguments are not
    modified; each column is coded on its own.
    """

    @abc.abstractmethod
    def encode(self, dictionary: Array, target: Array, n_nonzero: int) -> Coding:
        """Code the columns of a target.

        Parameters
        ----------
        dictionary : array, shape (in_features, n_atoms), floating
            Atoms of unit norm as columns; a zero atom is never used.
        target : array, shape (in_features, n_columns)
            Of the same library, device and dtype.
        n_nonzero : int
            Largest number of non-zeros per column, at most n_atoms.

        Returns
        -------
        Coding
            In the library, device and dtype of the target.
        """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Let the options of a learner be checked: a coder is taken as it is, never built from a mapping."""
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)


@dataclass(frozen=True, kw_only=True)
class BatchOMP(Coder):
    """Orthogonal matching pursuit with the Gram A^T A at hand (Pati 1993; Rubinstein, Zibulevsky, Elad 2008).

    For each column the orthonormal directions q_l of the chosen atoms are kept through p_l = A^T q_l alone.  With
    alpha = A^T (residual) a step takes the atom i of the largest |alpha_i| and forms

        r_l = p_l[i],   pivot^2 = G_ii - sum_l r_l^2,   p = (G_i - sum_l r_l p_l) / pivot,
        c = alpha_i / pivot,   alpha <- alpha - c p,

    and the coefficients follow from one back-substitution with the triangle of the (r, pivot): cheaper than Batch-OMP's
    own recursion, which solves two triangular systems in each step.  Ties go to the lowest atom, and the result does
    not depend on the number of threads.

    Arrays on the CPU take a compiled loop over the columns that stays in the cache; others go through all columns of a
    batch in lockstep.

    Attributes
    ----------
    memory_mib : int
        Work space of one lockstep batch in MiB; sets how many columns it has.
    compiled : bool
        Use the compiled loop for numpy and torch arrays on the CPU.
    """

    memory_mib: int = 1024
    compiled: bool = True

    def __post_init__(self) -> None:
        if self.memory_mib < 1:
            raise UsageError(f"memory_mib={self.memory_mib}: expected at least 1")

    def encode(self, dictionary: Array, target: Array, n_nonzero: int) -> Coding:
        """Code the columns of a target; see ``Coder.encode``."""
        xp = namespace(dictionary, target)
        gram = dictionary.T @ dictionary
        starts = target.T @ dictionary
        rounding = float(xp.finfo(target.dtype).eps)
        limits = (PIVOT_ROUNDINGS * rounding, NOISE_ROUNDINGS * rounding)
        if self.compiled and has_kernels(target):
            from cospadi.solvers.kernels import pursue

            gram, starts = (np.ascontiguousarray(convert(array, "numpy")) for array in (gram, starts))
            rows, dependent = pursue(gram, starts, n_nonzero, *limits)
            # In the memory order of the other arrays: a sum of two orders is several times slower than a sum.
            return Coding(convert(np.ascontiguousarray(rows.T), library_of(target)), int(dependent.sum()))
        n_columns, n_atoms = starts.shape
        per_column = max(1, n_nonzero * (n_atoms + n_nonzero) * (8 if target.dtype == xp.float64 else 4))
        batch = min(n_columns, max(1, self.memory_mib * 2**20 // per_column))
        parts = [
            _lockstep(gram, starts[at : min(at + batch, n_columns), :], n_nonzero, *limits)
            for at in range(0, n_columns, batch)
        ]
        return Coding(xp.concat([part for part, _ in parts], axis=0).T, sum(int(xp.sum(count)) for _, count in parts))


def _lockstep(gram: Array, starts: Array, n_nonzero: int, pivot_floor: float, noise: float) -> tuple[Array, Array]:
    """Pursue all columns of a batch at once; arguments and results as those of ``kernels.pursue``."""
    xp = namespace(gram, starts)
    n_columns, n_atoms = starts.shape
    place = {"dtype": starts.dtype, "device": device(starts)}
    numbers = xp.arange(n_atoms, device=device(starts))[None, :]
    rows = xp.zeros((n_columns, n_nonzero, n_atoms), **place)
    triangle = xp.zeros((n_columns, n_nonzero, n_nonzero), **place)
    solution = xp.zeros((n_columns, n_nonzero), **place)
    chosen = []
    alpha = starts
    free = xp.ones(starts.shape, dtype=xp.bool, device=device(starts))
    floors = noise * xp.max(xp.abs(starts), axis=1)
    active = xp.ones((n_columns,), dtype=xp.bool, device=device(starts))
    dependent = xp.zeros((n_columns,), dtype=xp.int64, device=device(starts))
    for j in range(n_nonzero):
        magnitudes = xp.where(free, xp.abs(alpha), -xp.ones_like(alpha))
        atom = xp.argmax(magnitudes, axis=1)[:, None]
        active = active & (xp.take_along_axis(magnitudes, atom, axis=1)[:, 0] > floors)
        gram_rows = xp.take(gram, atom[:, 0], axis=0)
        energy = xp.take_along_axis(gram_rows, atom, axis=1)[:, 0]
        if j:
            index = xp.broadcast_to(atom[:, :, None], (n_columns, j, 1))
            factors = xp.take_along_axis(rows[:, :j, :], index, axis=2)[:, :, 0]
            energy = energy - xp.sum(factors * factors, axis=1)
            gram_rows = gram_rows - (factors[:, None, :] @ rows[:, :j, :])[:, 0, :]
            triangle[:, :j, j] = factors
        stuck = active & (energy <= pivot_floor)
        dependent = dependent + xp.astype(stuck, xp.int64)
        active = active & ~stuck
        pivot = xp.sqrt(xp.where(active, energy, xp.ones_like(energy)))
        step = xp.where(active, xp.take_along_axis(alpha, atom, axis=1)[:, 0] / pivot, xp.zeros_like(pivot))
        triangle[:, j, j] = pivot
        solution[:, j] = step
        rows[:, j, :] = xp.where(active[:, None], gram_rows / pivot[:, None], xp.zeros_like(gram_rows))
        alpha = alpha - step[:, None] * rows[:, j, :]
        taken = (numbers == atom) & active[:, None]
        free = free & ~taken
        chosen.append(atom)
    coefficients = xp.zeros_like(starts)
    for j in range(n_nonzero - 1, -1, -1):
        x = solution[:, j] / triangle[:, j, j]
        coefficients = xp.where((numbers == chosen[j]) & (x != 0)[:, None], x[:, None], coefficients)
        if j:
            solution[:, :j] = solution[:, :j] - x[:, None] * triangle[:, :j, j]
    return coefficients, dependent


@dataclass(frozen=True, kw_only=True)
class GeneralizedOMP(Coder):
    """Matching pursuit that takes several atoms per step (Wang, Kwon, Shim 2012), over all columns at once.

    The coefficients follow by conjugate gradients on the growing support, warm-started, instead of a triangular factor
    per column: all work is matrix products of full size, with n_nonzero / atoms_per_step steps.  The supports are close
    to those of ``BatchOMP`` and not the same.

    Attributes
    ----------
    atoms_per_step : int
        Atoms that each column takes in one step.
    cg_steps, final_cg_steps : int
        Conjugate gradient steps after each step, and after the last one.
    """

    atoms_per_step: int = 16
    cg_steps: int = 3
    final_cg_steps: int = 10

    def __post_init__(self) -> None:
        if min(self.atoms_per_step, self.cg_steps, self.final_cg_steps) < 1:
            raise UsageError(
                f"atoms_per_step={self.atoms_per_step}, cg_steps={self.cg_steps}, "
                f"final_cg_steps={self.final_cg_steps}: expected at least 1"
            )

    def encode(self, dictionary: Array, target: Array, n_nonzero: int) -> Coding:
        """Code the columns of a target; see ``Coder.encode``."""
        xp = namespace(dictionary, target)
        gram, start = dictionary.T @ dictionary, dictionary.T @ target
        noise = NOISE_ROUNDINGS * float(xp.finfo(target.dtype).eps) * xp.max(xp.abs(start), axis=0)[None, :]
        S = xp.zeros_like(start)
        gradient = start
        for taken in range(0, n_nonzero, self.atoms_per_step):
            free = (S == 0) & (xp.abs(gradient) > noise)
            entering = hard_threshold(
                xp.where(free, gradient, xp.zeros_like(gradient)), min(self.atoms_per_step, n_nonzero - taken)
            )
            # Any value but zero marks the support.  This step is short enough for m unit atoms, whatever their angles,
            # so the error cannot rise.
            S = S + entering / self.atoms_per_step
            last = taken + self.atoms_per_step >= n_nonzero
            S = conjugate_gradients(gram, start - gram @ S, S, self.final_cg_steps if last else self.cg_steps)
            gradient = start - gram @ S
        return Coding(S)


@dataclass(frozen=True, kw_only=True)
class SpamsOMP(Coder):
    """``spams.omp`` in C++ on the CPU (Mairal 2010).

    It selects by order-recursive matching, which looks at how much an atom would lower the error and not at its
    correlation, so the supports differ from those of ``BatchOMP``.

    Attributes
    ----------
    threads : int
        Threads; -1 takes all cores.
    """

    threads: int = -1

    def encode(self, dictionary: Array, target: Array, n_nonzero: int) -> Coding:
        """Code the columns of a target; see ``Coder.encode``."""
        spams = load_spams()
        A, Y = (np.asarray(convert(array, "numpy")) for array in (dictionary, target))
        coefficients = np.zeros((A.shape[1], Y.shape[1]), Y.dtype)
        # SPAMS divides by the norms of what is left of the atoms: it must not see a zero one.
        usable = np.flatnonzero(np.any(A != 0, axis=0))
        if n_nonzero and usable.size:
            # Without explicit eps and lambda1 the wrapper (2.6.14) reads memory that it never set, and codes nothing.
            coded = spams.omp(
                np.asfortranarray(Y),
                np.asfortranarray(A[:, usable]),
                L=min(n_nonzero, usable.size),
                eps=0.0,
                lambda1=0.0,
                numThreads=self.threads,
            )
            coefficients[usable] = coded.toarray()
        return Coding(convert(coefficients, library_of(target)))


@dataclass(frozen=True, kw_only=True)
class SklearnOMP(Coder):
    """``sklearn.linear_model.orthogonal_mp_gram`` in float64: slow, and trusted."""

    def encode(self, dictionary: Array, target: Array, n_nonzero: int) -> Coding:
        """Code the columns of a target; see ``Coder.encode``."""
        from sklearn.linear_model import orthogonal_mp_gram

        A, Y = (np.asarray(convert(array, "numpy"), np.float64) for array in (dictionary, target))
        coefficients = np.zeros((A.shape[1], Y.shape[1]))
        dependent = 0
        if n_nonzero:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RuntimeWarning)
                coded = orthogonal_mp_gram(A.T @ A, A.T @ Y, n_nonzero_coefs=n_nonzero)
            dependent = len(caught)
            coefficients = coded.reshape(coefficients.shape)
        return Coding(
            convert(coefficients.astype(np.dtype(str(target.dtype).split(".")[-1])), library_of(target)), dependent
        )


@dataclass(frozen=True, kw_only=True)
class HardThreshold(Coder):
    """The largest correlations: exact for orthonormal atoms, rough for others."""

    def encode(self, dictionary: Array, target: Array, n_nonzero: int) -> Coding:
        """Code the columns of a target; see ``Coder.encode``."""
        return Coding(hard_threshold(dictionary.T @ target, n_nonzero))


CODERS: dict[str, type[Coder]] = {
    "omp": BatchOMP,
    "gomp": GeneralizedOMP,
    "spams": SpamsOMP,
    "sklearn": SklearnOMP,
    "threshold": HardThreshold,
}


def as_coder(coder: str | Coder) -> Coder:
    """Give a coder from its name, or the coder itself.

    Raises
    ------
    UsageError
        The name is unknown.
    """
    if isinstance(coder, Coder):
        return coder
    if coder not in CODERS:
        raise UsageError(f"unknown coder {coder!r}{nearest(str(coder), list(CODERS))}")
    return CODERS[coder]()


def has_kernels(array: Array) -> bool:
    """Tell whether the compiled kernels take this array: numpy or torch, in the memory of the host."""
    return library_of(array) in ("numpy", "torch") and on_cpu(array)


def load_spams() -> Any:
    """Import SPAMS.

    Raises
    ------
    UnavailableError
        SPAMS is not installed.
    """
    try:
        import spams
    except ImportError as error:
        raise UnavailableError("SPAMS is not installed: pip install 'cospadi[spams]'") from error
    return spams
