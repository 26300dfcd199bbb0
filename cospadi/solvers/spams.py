"""Adapter to SPAMS, the C++ toolbox for sparse modelling."""

import importlib.util
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np

from cospadi.arrays import Array
from cospadi.errors import UsageError
from cospadi.registry import Availability
from cospadi.solvers.base import Solution, Solver, Status
from cospadi.solvers.coders import SpamsOMP, load_spams
from cospadi.solvers.ksvd import KSVD
from cospadi.solvers.updates import spectral_start, unit_columns


@final
@dataclass(frozen=True, kw_only=True)
class Spams(Solver):
    """min ||Y - A S||^2 with SPAMS (Mairal, Bach, Ponce, Sapiro 2010).

    Attributes
    ----------
    method : {"omp", "trainDL"}
        ``omp``: K-SVD with ``spams.omp`` as the coder; ``trainDL``: SPAMS's own online dictionary learning, then
        ``spams.omp``.
    n_iter : int
        Alternations of ``omp``, or passes over mini-batches of ``trainDL``.
    threads : int
        Threads of SPAMS; -1 takes all cores.
    """

    library: ClassVar[str | None] = "numpy"
    method: Literal["omp", "trainDL"] = "omp"
    n_iter: int = 20
    threads: int = -1

    def __post_init__(self) -> None:
        if self.method not in ("omp", "trainDL"):
            raise UsageError(f"method={self.method!r}: expected 'omp' or 'trainDL'")
        if self.n_iter < 1:
            raise UsageError(f"n_iter={self.n_iter}: expected at least 1")

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether SPAMS is installed."""
        if importlib.util.find_spec("spams") is None:
            return Availability(False, "SPAMS is not installed: pip install 'cospadi[spams]'")
        return Availability(True)

    def _factorize(self, target: Array, n_atoms: int, n_nonzero: int, seed: int) -> Solution:
        coder = SpamsOMP(threads=self.threads)
        if self.method == "omp":
            return KSVD(coder=coder, n_iter=self.n_iter)._factorize(target, n_atoms, n_nonzero, seed)
        A, _ = spectral_start(target, n_atoms, n_nonzero)
        if n_nonzero and np.any(target):
            # mode 3 bounds the number of non-zeros; modeD 0 keeps the atoms in the unit ball
            learned = load_spams().trainDL(
                np.asfortranarray(target),
                D=np.asfortranarray(A),
                mode=3,
                lambda1=n_nonzero,
                modeD=0,
                iter=self.n_iter,
                numThreads=self.threads,
                verbose=False,
            )
            A = unit_columns(np.ascontiguousarray(learned))[0]
        S = coder.encode(A, target, n_nonzero).coefficients
        return Solution(A, S, Status.MAX_ITERATIONS, {"iterations": self.n_iter})
