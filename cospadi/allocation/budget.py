"""From the fraction of bytes to remove to the number of atoms and non-zeros of one group."""

from collections.abc import Callable
from dataclasses import dataclass

from cospadi.formats import Format, group_bits

DENSE_BITS = 16
"""Bits of one weight of the dense layers that ratios compare with: bfloat16."""


@dataclass(frozen=True)
class GroupShape:
    """The shape of one group: its input width and each member's output width."""

    in_features: int
    out_features: tuple[int, ...]

    @property
    def dense_bits(self) -> int:
        """Bits of the members' dense weights in bfloat16."""
        return DENSE_BITS * self.in_features * sum(self.out_features)


@dataclass(frozen=True)
class Size:
    """What a group may spend.

    Attributes
    ----------
    n_atoms : int
        Columns of the dictionary.
    n_nonzero : int
        Non-zeros in every column of the coefficients.
    bits : int
        What the factorisation takes on disk, with mask, indices and scales.
    """

    n_atoms: int
    n_nonzero: int
    bits: int


@dataclass(frozen=True)
class Budget:
    """How many bits a group may take, and how they are counted.

    Attributes
    ----------
    ratio : float
        Fraction of the dense bits to remove.
    rho : float
        Atoms per non-zero of a column.  Where that asks for more atoms than input features, the honest convention stops
        at as many atoms and spends the rest on non-zeros.
    format : Format
        Counts the bits of the coefficients.
    value_dtype : str
        Of the coefficients, see ``VALUE_BITS``; that of the dictionary follows from it.
    convention : {"honest", "paper"}
        ``honest``: all bits that land on disk.  ``paper``: ``k = (1 - ratio) d1 d2 / (d1 + d2 / rho)``, which leaves
        the mask out (arXiv 2509.22075, eq. 49).
    sparse : bool
        False for dense coefficients (low rank): every atom is used by every column.
    """

    ratio: float
    rho: float
    format: Format
    value_dtype: str
    convention: str = "honest"
    sparse: bool = True

    def bits(self, shape: GroupShape, n_atoms: int, n_nonzero: int) -> int:
        """Count the bits on disk of a group's dictionary and coefficients."""
        return group_bits(shape.in_features, n_atoms, shape.out_features, n_nonzero, self.format, self.value_dtype)

    def size(self, shape: GroupShape) -> Size | None:
        """Give the largest dictionary that the ratio allows; None when not even one atom fits or nothing is saved."""
        width = sum(shape.out_features)
        if self.convention == "paper":
            per_atom = shape.in_features + width / (self.rho if self.sparse else 1)
            n_atoms = min(int((1 - self.ratio) * shape.in_features * width / per_atom), width)
            n_nonzero = self._nonzero(n_atoms)
        else:
            allowed = (1 - self.ratio) * shape.dense_bits
            most = min(shape.in_features, width)
            n_atoms = _largest(0, most, lambda k: self.bits(shape, k, self._nonzero(k)) <= allowed)
            n_nonzero = self._nonzero(n_atoms)
            if self.sparse and n_atoms == shape.in_features:
                n_nonzero = _largest(n_nonzero, n_atoms, lambda s: self.bits(shape, n_atoms, s) <= allowed)
        if n_atoms < 1:
            return None
        bits = self.bits(shape, n_atoms, n_nonzero)
        return Size(n_atoms, n_nonzero, bits) if bits < shape.dense_bits else None

    def _nonzero(self, n_atoms: int) -> int:
        return max(1, int(n_atoms / self.rho)) if self.sparse else n_atoms


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """Give the largest number in [low, high] that fits, by bisection; ``low`` is taken to fit."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
