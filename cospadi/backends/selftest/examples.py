"""Layers with random supports, and their products in float64."""

from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor

from cospadi.backends.base import Placement
from cospadi.formats import FORMATS, PackedCoefficients, PackedDictionary, pack_dictionary, unpack_dictionary

VALUE_DTYPES = ("bfloat16", "int8")

SMALL = ((11, 19, (23,)), (64, 128, (96,)), (130, 200, (72, 17, 40)))
"""Input features, atoms and the output features of each layer of a group."""
LARGE = ((1000, 1500, (777,)), (512, 640, (512, 128, 128)))
LARGEST = (4096, 5734, (4096,))


@dataclass(frozen=True)
class Example:
    """Layers that share a dictionary, stored, with their product in float64.

    Attributes
    ----------
    name : str
    density : float
        Of S.
    dictionary : PackedDictionary or None
        None where there are only coefficients.
    members : list of PackedCoefficients
    weights : list of Tensor, shape (in_features, out_features), float64
        D S of each layer, as stored.
    """

    name: str
    density: float
    dictionary: PackedDictionary | None
    members: list[PackedCoefficients]
    weights: list[Tensor] = field(repr=False)

    @property
    def in_features(self) -> int:
        """Input features of the layers."""
        return self.weights[0].shape[0]

    def weight(self, member: int | None) -> Tensor:
        """Give D S of one layer, or of all side by side."""
        return torch.cat(self.weights, dim=1) if member is None else self.weights[member]

    def inputs(self, n_tokens: int, placement: Placement) -> Tensor:
        """Give random x for a number of tokens."""
        generator = torch.Generator().manual_seed(n_tokens)
        x = torch.randn(n_tokens, self.in_features, generator=generator)
        return x.to(placement.device, placement.dtype)


def examples(device: torch.device, large: bool) -> list[Example]:
    """Make the layers that are checked."""
    found = []
    for value_dtype, shape in product(VALUE_DTYPES, SMALL + (LARGE if large else ())):
        for density in (0.0, 0.1, 0.5, 1.0):
            found.append(example(shape, density, value_dtype, device))
        found += factors_alone(found[-2])
    if large:
        found += [example(LARGEST, 0.5, value_dtype, device) for value_dtype in VALUE_DTYPES]
    return found


def example(shape: tuple[int, int, tuple[int, ...]], density: float, value_dtype: str, device: torch.device) -> Example:
    """Make layers with random supports of a density; outputs are about as large as inputs."""
    in_features, n_atoms, widths = shape
    generator = torch.Generator().manual_seed(in_features)
    dictionary = torch.randn(in_features, n_atoms, generator=generator) / in_features**0.5
    packed_dictionary = pack_dictionary(dictionary.to(device), value_dtype)
    atoms = unpack_dictionary(packed_dictionary).double()
    members, weights = [], []
    for width in widths:
        S = torch.randn(n_atoms, width, generator=generator) / max(n_atoms * density, 1.0) ** 0.5
        S[torch.rand(S.shape, generator=generator) >= density] = 0
        packed = FORMATS.create("bitmask").pack(S.to(device), value_dtype)
        members.append(packed)
        weights.append(atoms.T @ FORMATS.create("bitmask").unpack(packed).double())
    name = f"{in_features} x {n_atoms} x {'+'.join(map(str, widths))}, density {density:g}, {value_dtype}"
    return Example(name, density, packed_dictionary, members, weights)


def factors_alone(whole: Example) -> list[Example]:
    """Take the two products apart, as layers whose dictionary is on the side of the outputs need them."""
    assert whole.dictionary is not None
    atoms = unpack_dictionary(whole.dictionary).double()
    sparse = [FORMATS.create(packed.format).unpack(packed).double() for packed in whole.members]
    nothing = FORMATS.create("identity").pack(torch.eye(len(atoms), device=atoms.device), "none")
    return [
        Example(f"{whole.name}, D alone", whole.density, whole.dictionary, [nothing], [atoms.T]),
        Example(f"{whole.name}, S alone", whole.density, None, whole.members, sparse),
    ]
