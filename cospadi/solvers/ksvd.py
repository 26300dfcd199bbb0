"""K-SVD: sparse coding in turns with rank-one refits of the atoms, on the arrays of numpy, torch or cupy."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np

from cospadi.arrays import Array, convert, cupy_availability, library_of
from cospadi.errors import UsageError
from cospadi.registry import Availability
from cospadi.solvers.alternating import AlternatingSolver
from cospadi.solvers.atoms import update_atoms_arrays, update_blocks_in_sequence, update_blocks_jointly
from cospadi.solvers.coders import has_kernels


@dataclass(frozen=True, kw_only=True)
class KSVD(AlternatingSolver):
    """K-SVD (Aharon, Elad, Bruckstein 2006), by default in a fast form.

    One alternation codes all columns, then refits each atom a_i with its coefficients s_i on the columns Omega that use
    it towards the best rank-one fit of E = (Y - A S + a_i s_i)_Omega.  The support is kept and the error cannot rise.
    E is never formed: with R = Y - A S and v = E^T u,

        v = R^T u + s_i <a_i, u>,   E v = R v + a_i <s_i, v>   (on Omega).

    The recipe of CoSpaDi (arXiv 2509.22075) is ``block=1, power_iterations=8, pursue_every=1, init="columns",
    tolerance=0``: atoms one after the other, matching pursuit from scratch in each alternation.

    Attributes
    ----------
    block : int
        Atoms that are refitted together, with products of matrices; 1 refits one after the other.  Joint blocks of more
        than a quarter of all atoms converge more slowly.
    within : {"joint", "sequence"}
        How the atoms of a block are refitted: all at once with exact step lengths (see ``update_blocks_jointly``), or
        with the result of one after the other, each by a power step from its coefficients (see
        ``update_blocks_in_sequence``).
    power_iterations : int
        Power steps per atom with ``block=1``, from the current atom; else how often each block is refitted.
    pursue_every : int or "auto"
        As of ``AlternatingSolver``; by default the pursuit is repeated only where that pays.
    compiled : bool
        Use the compiled update for ``block=1`` and numpy and torch arrays on the CPU.
    """

    block: int = 32
    within: Literal["joint", "sequence"] = "joint"
    power_iterations: int = 1
    pursue_every: int | Literal["auto"] = "auto"
    compiled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power_iterations < 1:
            raise UsageError(f"power_iterations={self.power_iterations}: expected at least 1")
        if self.block < 1:
            raise UsageError(f"block={self.block}: expected at least 1")
        if self.within not in ("joint", "sequence"):
            raise UsageError(f"within={self.within!r}: expected 'joint' or 'sequence'")

    def _update(self, Y: Array, A: Array, S: Array, residual: Array) -> tuple[Array, Array, Array]:
        if self.block > 1:
            refit = update_blocks_jointly if self.within == "joint" else update_blocks_in_sequence
            return refit(A, S, residual, self.block, self.power_iterations)
        if self.compiled and has_kernels(Y):
            from cospadi.solvers.kernels import update_atoms

            library = library_of(Y)
            rows, atoms = (np.array(convert(array, "numpy").T, order="C") for array in (residual, A))
            S = np.array(convert(S, "numpy"), order="C")
            update_atoms(rows, atoms, S, self.power_iterations)
            return convert(atoms, library).T, convert(S, library), convert(rows, library).T
        return update_atoms_arrays(A, S, residual, self.power_iterations)


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
