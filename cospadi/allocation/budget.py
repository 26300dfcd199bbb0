"""From the fraction of bytes to remove to the number of atoms and non-zeros of one group."""

from dataclasses import dataclass

from cospadi.formats.base import VALUE_BITS, Format

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
        What the factorisation takes on disk, mask or indices included.
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
        Atoms per non-zero of a column.
    format : Format
        Counts the bits of the coefficients.
    value_dtype : str
        Of the coefficients; see ``VALUE_BITS``.
    convention : {"honest", "paper"}
        ``honest``: all bits that land on disk.  ``paper``: ``k = (1 - ratio) d1 d2 / (d1 + d2 / rho)``, which leaves the
        mask out (arXiv 2509.22075, eq. 49).
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
        # The 14-bit type is for coefficients only; the dictionary beside them is bfloat16.
        dictionary_bits = DENSE_BITS if self.value_dtype == "bfloat14" else VALUE_BITS[self.value_dtype]
        total = dictionary_bits * shape.in_features * n_atoms
        for width in shape.out_features:
            stored = self.format.count_stored(n_atoms, width, n_nonzero)
            total += self.format.bits(n_atoms, width, stored, self.value_dtype)
        return total

    def size(self, shape: GroupShape) -> Size | None:
        """Give the largest dictionary that the ratio allows, or None when not even one atom fits or nothing is saved."""
        width = sum(shape.out_features)
        if self.convention == "paper":
            per_atom = shape.in_features + width / (self.rho if self.sparse else 1)
            n_atoms = min(int((1 - self.ratio) * shape.in_features * width / per_atom), self._most_atoms(shape))
        else:
            allowed = (1 - self.ratio) * shape.dense_bits
            low, high = 0, self._most_atoms(shape)
            while low < high:  # bits grow with the atoms: the largest number that still fits
                middle = (low + high + 1) // 2
                if self.bits(shape, middle, self._nonzero(middle)) <= allowed:
                    low = middle
                else:
                    high = middle - 1
            n_atoms = low
        if n_atoms < 1:
            return None
        bits = self.bits(shape, n_atoms, self._nonzero(n_atoms))
        return Size(n_atoms, self._nonzero(n_atoms), bits) if bits < shape.dense_bits else None

    def _nonzero(self, n_atoms: int) -> int:
        return max(1, int(n_atoms / self.rho)) if self.sparse else n_atoms

    def _most_atoms(self, shape: GroupShape) -> int:
        # With as many atoms as columns (or, when dense, as the rank) the factorisation is exact: more are of no use.
        width = sum(shape.out_features)
        return width if self.sparse else min(shape.in_features, width)
