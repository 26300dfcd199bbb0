"""What a storage format of the coefficients takes and gives.

A format alone knows its bits: allocation asks it for the price of a factorisation, the checkpoint asks it for the
names, shapes and dtypes of its tensors.  Written byte by byte in docs/format.md.
"""

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cospadi.registry import Availability, Registry

VALUE_BITS = {"bfloat16": 16, "float16": 16, "float32": 32, "bfloat14": 14, "int8": 8}
"""Bits of one stored coefficient.

``bfloat14`` is bfloat16 without its two lowest mantissa bits; ``int8`` has a float32 scale per column of S besides.
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
        A key of ``VALUE_BITS``.
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
    values : Tensor, shape (n_atoms, in_features), floating or int8
        Atoms as rows.
    scales : Tensor, shape (n_atoms,), float32, or None
        For int8 values: atom i is ``values[i] * scales[i]``.
    """

    values: Tensor
    scales: Tensor | None = None


class Format(abc.ABC):
    """Base of the storage formats; stateless.

    Laws: ``unpack(pack(S, dtype))`` equals S rounded to the stored dtype, exactly; ``pack`` of the unpacked S gives the
    same tensors; the tensors have the names, shapes and dtypes of ``layout`` and together ``bits`` bits, rounded up to
    whole bytes per tensor.
    """

    name: ClassVar[str]

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
    def pack(self, coefficients: Tensor, value_dtype: str) -> PackedCoefficients:
        """Store S, shape (n_atoms, out_features), rounding the values to nearest even in ``value_dtype``.

        For ``int8`` that is to multiples of the scale that ``quantize_rows`` gives each column.

        Raises
        ------
        UsageError
            The format does not offer this value dtype.
        NumericalError
            A value overflows the dtype or is not finite.
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
        """Give S, shape (n_atoms, out_features), in the stored dtype (bfloat16 for ``bfloat14``, float32 for ``int8``).

        Raises
        ------
        CheckpointError
            The tensors contradict each other: wrong shapes, a mask that counts other than the values, indices that are
            out of range or not ascending, padding bits that are set, scales that ``quantize_rows`` never gives.
        """

    @abc.abstractmethod
    def gather(self, packed: PackedCoefficients, matrix: Tensor) -> Tensor:
        """Give the entries of a matrix like S, shape (n_atoms, out_features), at the places that are stored.

        They have the order and the shape of ``values`` (without 8-bit or 14-bit encoding), so this is the adjoint of
        ``unpack``: what gradients to the stored values need.
        """


FORMATS: Registry[Format] = Registry("cospadi.formats", "format")
