"""K-SVD: sparse coding in turns with rank-one refits of the atoms, on the arrays of numpy, torch or cupy."""

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from cospadi.arrays import Array, convert, cupy_availability, library_of, namespace
from cospadi.errors import UsageError
from cospadi.registry import Availability
from cospadi.solvers.alternating import AlternatingSolver
from cospadi.solvers.coders import has_kernels
from cospadi.solvers.updates import unit_columns


@dataclass(frozen=True, kw_only=True)
class KSVD(AlternatingSolver):
    """K-SVD (Aharon, Elad, Bruckstein 2006) with the settings of CoSpaDi (arXiv 2509.22075).

    One alternation codes all columns, then refits the atoms one after the other: for atom a_i with coefficients s_i on
    the columns Omega that use it, (a_i, s_i) becomes the best rank-one fit of E = (Y - A S + a_i s_i)_Omega, through
    power steps u <- E E^T u from the current atom.  E is never formed: with R = Y - A S and v = E^T u,

        v = R^T u + s_i <a_i, u>,   E v = R v + a_i <s_i, v>   (on Omega),

    and R is corrected by a_i s_i - u v.  The support is kept and the error cannot rise.

    Attributes
    ----------
    power_iterations : int
        Power steps per atom.
    compiled : bool
        Use the compiled update for numpy and torch arrays on the CPU.
    """

    power_iterations: int = 8
    compiled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power_iterations < 1:
            raise UsageError(f"power_iterations={self.power_iterations}: expected at least 1")

    def _update(self, Y: Array, A: Array, S: Array, residual: Array) -> tuple[Array, Array, Array]:
        if self.compiled and has_kernels(Y):
            from cospadi.solvers.kernels import update_atoms

            library = library_of(Y)
            rows, atoms = (np.array(convert(array, "numpy").T, order="C") for array in (residual, A))
            S = np.array(convert(S, "numpy"), order="C")
            update_atoms(rows, atoms, S, self.power_iterations)
            return convert(atoms, library).T, convert(S, library), convert(rows, library).T
        return update_atoms_arrays(A, S, residual, self.power_iterations)


def update_atoms_arrays(A: Array, S: Array, residual: Array, power_iterations: int) -> tuple[Array, Array, Array]:
    """Do what ``kernels.update_atoms`` does, with masked products over all columns; for GPUs.

    Parameters
    ----------
    A : array, shape (in_features, n_atoms)
    S : array, shape (n_atoms, n_columns)
    residual : array, shape (in_features, n_columns)

    Returns
    -------
    A, S, residual : array
        New arrays.
    """
    xp = namespace(A, S, residual)
    A, S = xp.asarray(A, copy=True), xp.asarray(S, copy=True)
    for i in range(A.shape[1]):
        old, s = A[:, i], S[i, :]
        mask = xp.astype(s != 0, s.dtype)
        atom = xp.asarray(old, copy=True)
        for _ in range(power_iterations):
            v = mask * (atom @ residual + s * xp.vecdot(old, atom))
            direction, size = unit_columns((residual @ v + old * xp.vecdot(s, v))[:, None])
            atom = xp.where(size > 0, direction[:, 0], atom)
        v = mask * (atom @ residual + s * xp.vecdot(old, atom))
        residual = residual + old[:, None] * s[None, :] - atom[:, None] * v[None, :]
        A[:, i] = atom
        S[i, :] = v
    return A, S, residual


@final
@dataclass(frozen=True, kw_only=True)
class NumpyKSVD(KSVD):
    """K-SVD on numpy arrays, with compiled loops."""

    library: ClassVar[str | None] = "numpy"


@final
@dataclass(frozen=True, kw_only=True)
class TorchKSVD(KSVD):
    """K-SVD on torch tensors, on the device of the target."""

    library: ClassVar[str | None] = "torch"


@final
@dataclass(frozen=True, kw_only=True)
class CupyKSVD(KSVD):
    """K-SVD on cupy arrays; needs an NVIDIA GPU."""

    library: ClassVar[str | None] = "cupy"

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether cupy is installed and finds a GPU."""
        return cupy_availability()
