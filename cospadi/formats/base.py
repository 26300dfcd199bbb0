"""The contract of a storage format of the coefficients.

A format alone knows its bits: allocation asks it for the price of a factorisation, the checkpoint asks it for the
names, shapes and dtypes of its tensors.  Written byte by byte in docs/format.md.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cospadi.formats.quantization import Grid
from cospadi.registry import Availability, Registry

VALUE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "bfloat14": 14, "int8": 8, "int6": 6, "int4": 4}
"""Bits of one stored coefficient.

``bfloat14`` is bfloat16 without its two lowest mantissa bits; ``int8``, ``int6`` and ``int4`` have a float32 scale per
column of S besides (``cospadi.formats.quantization``).
"""


@dataclass(frozen=True)
class PackedCoefficients:
    """The coefficients of one layer as they are stored.

    Attributes
    ----------
    format : str
        Registry name of the format.
    n_atoms, out_features : int
        Shape of S.
    value_dtype : str
        One of the format's ``value_dtypes``.
    tensors : dict of str to Tensor
        The format's tensors by their local names.
    """

    format: str
    n_atoms: int
    out_features: int
    value_dtype: str
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class PackedDictionary:
    """The dictionary of a group as it is stored.

    Attributes
    ----------
    values : Tensor, shape (n_atoms, in_features), floating or int8, or (n_atoms, bytes of a row), uint8
        Atoms as rows; where there is a grid, each as a string of bits (``cospadi.formats.bitstrings``).
    scales : Tensor or None
        For int8 values, shape (n_atoms,), float32: atom i is ``values[i] * scales[i]``.  With a grid as
        ``cospadi.formats.quantization.scale_shape`` says.
    grid : Grid or None
        Of values that are strings of bits.
    row_length : int or None
        Numbers in each such string, or atoms of the identity, which is not stored: its values have no columns.
    """

    values: Tensor
    scales: Tensor | None = None
    grid: Grid | None = None
    row_length: int | None = None

    @property
    def in_features(self) -> int:
        """Length of an atom."""
        return self.values.shape[1] if self.row_length is None else self.row_length

    @property
    def is_identity(self) -> bool:
        """Whether the dictionary is the identity and not stored."""
        return self.grid is None and self.row_length is not None


class Format(abc.ABC):
    """Base of the storage formats; stateless.

    Laws: ``unpack(pack(S, dtype))`` equals S rounded to the stored dtype, exactly; ``pack`` of the unpacked S gives the
    same tensors; the tensors have the names, shapes and dtypes of ``layout`` and together ``bits`` bits, rounded up to
    whole bytes per tensor.  S that lies on the grid of the scales that ``pack`` is given is stored exactly.

    Attributes
    ----------
    name : str
        In the registry.
    value_dtypes : tuple of str
        What it stores values in.
    is_identity : bool
        Whether S is always the identity and not stored: the dictionary is the weight, of a single layer.
    """

    name: ClassVar[str]
    value_dtypes: ClassVar[tuple[str, ...]]
    is_identity: ClassVar[bool] = False

    @classmethod
    def availability(cls) -> Availability:
        """Tell whether the format can be used here (the built-in ones always can)."""
        return Availability(True)

    @abc.abstractmethod
    def bits(self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str) -> int:
        """Count the bits of the coefficients of one layer as they land on disk: mask, indices, scales included."""

    @abc.abstractmethod
    def count_stored(self, n_atoms: int, out_features: int, n_nonzero: int) -> int:
        """Count the coefficients stored when every column has ``n_nonzero`` non-zeros."""

    @abc.abstractmethod
    def layout(
        self, n_atoms: int, out_features: int, n_stored: int, value_dtype: str
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Give local name to (shape, dtype) of every tensor: enough to build an empty module on the meta device."""

    @abc.abstractmethod
    def n_stored(self, packed: PackedCoefficients) -> int:
        """Count the coefficients that are stored, of checked tensors."""

    @abc.abstractmethod
    def pack(self, coefficients: Tensor, value_dtype: str, scales: Tensor | None = None) -> PackedCoefficients:
        """Store S, shape (n_atoms, out_features), rounding the values to nearest even in ``value_dtype``.

        For the dtypes that have a scale per column that is to multiples of the scale: the given one, shape
        (out_features,), or that which ``quantize`` finds.

        Raises
        ------
        UsageError
            The format does not offer this value dtype, or scales are given to one that has none.
        NumericalError
            A value overflows the dtype or is not finite, or a scale is not one that a file can hold.
        """

    @abc.abstractmethod
    def check(self, packed: PackedCoefficients) -> None:
        """Check that the tensors fit each other, as ``unpack`` does but without the memory for S.

        Raises
        ------
        CheckpointError
            See ``unpack``.
        """

    @abc.abstractmethod
    def unpack(self, packed: PackedCoefficients) -> Tensor:
        """Give S, shape (n_atoms, out_features), in the stored dtype, or one that holds it exactly.

        That is bfloat16 for ``bfloat14`` and float32 for whole numbers with scales.

        Raises
        ------
        CheckpointError
            The tensors contradict each other: wrong shapes, a mask that counts other than the values, indices that are
            out of range or not ascending, padding bits that are set, scales that ``check_scales`` refuses.
        """

    @abc.abstractmethod
    def gather(self, packed: PackedCoefficients, matrix: Tensor) -> Tensor:
        """Give the entries of a matrix like S, shape (n_atoms, out_features), at the places that are stored.

        They have the order and the shape of ``values`` (without scales and strings of bits), so this is the adjoint of
        ``unpack``: what gradients to the stored values need.
        """


FORMATS: Registry[Format] = Registry("cospadi.formats", "format")
