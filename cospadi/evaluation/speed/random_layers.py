"""Layers to measure: shapes, sizes that compression would choose, and random factors of those sizes."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cospadi.allocation import Budget, GroupShape
from cospadi.errors import UsageError
from cospadi.formats import (
    FORMATS,
    PackedCoefficients,
    PackedDictionary,
    dictionary_dtype_of,
    pack_dictionary,
    unpack_dictionary,
)

FORMAT = "bitmask"

Shape = tuple[int, int]
"""Input and output features."""

LAYER_SHAPES: dict[str, tuple[Shape, ...]] = {
    "smollm2": ((576, 576), (576, 192), (576, 1536), (1536, 576)),
    "standard": ((2048, 2048), (4096, 4096), (4096, 11008)),
}
"""``smollm2``: the layers of SmolLM2-135M; ``standard``: two square layers and one of Llama-2-7B."""


@dataclass(frozen=True)
class LayerSize:
    """The sizes of a layer and of its compressed form.

    Attributes
    ----------
    in_features, out_features : int
    ratio : float
        Fraction of the bfloat16 bytes that is removed, mask and scales counted.
    value_dtype : str
        Of the coefficients; the dictionary has the same but for ``bfloat14``.
    n_atoms, n_nonzero : int
        Non-zeros of every column.
    stored_bytes : int
        Of dictionary and coefficients on disk.
    """

    in_features: int
    out_features: int
    ratio: float
    value_dtype: str
    n_atoms: int
    n_nonzero: int
    stored_bytes: int

    @property
    def label(self) -> str:
        """Name the layer in tables."""
        return f"{self.in_features}x{self.out_features} -{self.ratio:.0%}"


def layer_size(shape: Shape, ratio: float, value_dtype: str = "bfloat16", rho: float = 2.0) -> LayerSize:
    """Give the sizes that compression chooses for a layer.

    Parameters
    ----------
    shape : tuple of int
        Input and output features.
    ratio : float
        In (0, 1).
    value_dtype : str
        A key of ``VALUE_BITS``.
    rho : float
        Atoms per non-zero of a column.

    Raises
    ------
    UsageError
        The ratio leaves no room for an atom, or saves nothing.
    """
    if min(shape) < 1 or not 0 < ratio < 1:
        raise UsageError(f"layer {shape[0]}x{shape[1]}, ratio {ratio:g}: expected 1 or more, and a ratio in (0, 1)")
    size = Budget(ratio, rho, FORMATS.create(FORMAT), value_dtype).size(GroupShape(shape[0], (shape[1],)))
    if size is None:
        raise UsageError(f"a layer of {shape[0]}x{shape[1]} is too small for ratio {ratio:g}: give a larger shape")
    stored_bytes = -(-size.bits // 8)
    return LayerSize(*shape, ratio, value_dtype, size.n_atoms, size.n_nonzero, stored_bytes)


@dataclass(frozen=True)
class Layer:
    """A compressed layer and a dense one of its shape.

    Attributes
    ----------
    size : LayerSize
    dictionary : PackedDictionary
    coefficients : PackedCoefficients
    weight : Tensor, shape (out_features, in_features)
        Of the dense layer, in the dtype of its inputs.  Its values are random: only its bytes matter.
    """

    size: LayerSize
    dictionary: PackedDictionary
    coefficients: PackedCoefficients
    weight: Tensor

    @property
    def stored(self) -> Iterator[Tensor]:
        """Give the tensors of the compressed layer."""
        yield self.dictionary.values
        if self.dictionary.scales is not None:
            yield self.dictionary.scales
        yield from self.coefficients.tensors.values()

    def copy(self) -> "Layer":
        """Give a copy of the layer."""
        scales = self.dictionary.scales
        dictionary = PackedDictionary(self.dictionary.values.clone(), None if scales is None else scales.clone())
        tensors = {name: tensor.clone() for name, tensor in self.coefficients.tensors.items()}
        return Layer(self.size, dictionary, replace(self.coefficients, tensors=tensors), self.weight.clone())

    def expected(self, x: Tensor) -> Tensor:
        """Give x D S of the stored factors in float64."""
        atoms = unpack_dictionary(self.dictionary).double()
        return x.double() @ atoms.T @ FORMATS.create(FORMAT).unpack(self.coefficients).double()

    def expected_dense(self, x: Tensor) -> Tensor:
        """Give the product with the dense weight in float64."""
        return x.double() @ self.weight.double().T


def random_layer(size: LayerSize, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Layer:
    """Make a layer with random factors.

    The support of a column is a random choice of exactly ``n_nonzero`` atoms, and magnitudes are between a half and one
    and a half before scaling, so that no value is rounded to zero; outputs are about as large as inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(size.in_features, size.n_atoms, generator=generator) / size.in_features**0.5
    shape = (size.out_features, size.n_atoms)
    rows = torch.rand(shape, generator=generator) + 0.5
    rows *= torch.randint(0, 2, shape, generator=generator) * 2 - 1
    support = torch.rand(shape, generator=generator).topk(size.n_nonzero, dim=1).indices
    coefficients = torch.zeros(shape).scatter_(1, support, rows.gather(1, support)).T / size.n_nonzero**0.5
    weight = torch.randn(size.out_features, size.in_features, generator=generator) / size.in_features**0.5
    return Layer(
        size,
        pack_dictionary(atoms.to(device), dictionary_dtype_of(size.value_dtype)),
        FORMATS.create(FORMAT).pack(coefficients.to(device), size.value_dtype),
        weight.to(device, dtype),
    )


def random_inputs(n_tokens: int, in_features: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Make x, shape (n_tokens, in_features)."""
    generator = torch.Generator().manual_seed(seed + n_tokens)
    return torch.randn(n_tokens, in_features, generator=generator).to(device, dtype)
