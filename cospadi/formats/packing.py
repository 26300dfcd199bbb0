"""A factorised group to the tensors of a checkpoint, and back."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from cospadi.errors import CheckpointError, NumericalError
from cospadi.factorization import GroupSpec, MemberSpec, SparseFactorization
from cospadi.formats.base import FORMATS, VALUE_BITS, Format, PackedCoefficients, PackedDictionary
from cospadi.formats.dictionary import (
    dictionary_bits,
    dictionary_dtype_of,
    dictionary_layout,
    dictionary_tensors,
    pack_dictionary,
    packed_dictionary,
    unpack_dictionary,
)
from cospadi.formats.values import expect


def pack_group(
    factorization: SparseFactorization,
    format: str,
    value_dtype: str,
    biases: Mapping[str, Tensor],
    shared_input: bool,
) -> tuple[GroupSpec, dict[str, Tensor]]:
    """Give a group's description and its tensors by checkpoint name.

    Parameters
    ----------
    factorization : SparseFactorization
        Dictionary and coefficients; not modified.
    format, value_dtype : str
        Registry name of the format and a key of ``VALUE_BITS``.
    biases : mapping of str to Tensor, shape (out_features,)
        By member, for those that have one; stored in their own dtype.
    shared_input : bool
        Whether the members receive the very same input tensor.

    Raises
    ------
    UsageError
        Unknown format, or one that does not store the value dtype.
    NumericalError
        A number is not finite or overflows; names the member.
    """
    codec = FORMATS.create(format)
    tensors: dict[str, Tensor] = {}
    members: list[MemberSpec] = []
    for name, coefficients in factorization.coefficients.items():
        if not members:
            try:
                atoms = pack_dictionary(factorization.dictionary, dictionary_dtype_of(value_dtype))
            except NumericalError as error:
                raise NumericalError(f"{name}.dictionary: {error}") from error
            tensors.update({f"{name}.{local}": tensor for local, tensor in dictionary_tensors(atoms).items()})
        try:
            packed = codec.pack(coefficients.detach(), value_dtype)
        except NumericalError as error:
            raise NumericalError(f"{name}: the coefficients: {error}") from error
        tensors.update({f"{name}.{local}": tensor for local, tensor in packed.tensors.items()})
        if name in biases:
            tensors[f"{name}.bias"] = biases[name].detach().clone().contiguous()
        members.append(MemberSpec(name, packed.out_features, _count_values(packed), name in biases))
    spec = GroupSpec(
        in_features=factorization.in_features,
        n_atoms=factorization.n_atoms,
        members=tuple(members),
        format=format,
        value_dtype=value_dtype,
        dictionary_dtype=dictionary_dtype_of(value_dtype),
        shared_input=shared_input,
    )
    return spec, tensors


def unpack_group(spec: GroupSpec, tensors: Mapping[str, Tensor]) -> SparseFactorization:
    """Give the factorisation that the tensors of a group hold.

    It is in the stored dtypes, but bfloat16 for ``bfloat14`` and float32 for ``int8``.

    Raises
    ------
    CheckpointError
        A tensor is missing or does not fit the description; names it.
    """
    atoms = unpack_dictionary(packed_owner(spec, tensors))
    codec = FORMATS.create(spec.format)
    coefficients = {}
    for member in spec.members:
        try:
            coefficients[member.name] = codec.unpack(packed_member(spec, member, tensors))
        except CheckpointError as error:
            raise CheckpointError(f"{member.name}.{error}") from error
    return SparseFactorization(atoms.T, coefficients)


def packed_owner(spec: GroupSpec, tensors: Mapping[str, Tensor]) -> PackedDictionary:
    """Gather the stored dictionary of a group from tensors by checkpoint name and check it.

    Raises
    ------
    CheckpointError
        A tensor is missing or does not fit the description; names it.
    """
    names = dictionary_layout(spec.n_atoms, spec.in_features, spec.dictionary_dtype)
    own = {local: tensors[f"{spec.name}.{local}"] for local in names if f"{spec.name}.{local}" in tensors}
    try:
        return packed_dictionary(own, spec.n_atoms, spec.in_features, spec.dictionary_dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.name}.{error}") from error


def packed_member(spec: GroupSpec, member: MemberSpec, tensors: Mapping[str, Tensor]) -> PackedCoefficients:
    """Gather the stored coefficients of one member from tensors by checkpoint name."""
    layout = FORMATS.create(spec.format).layout(spec.n_atoms, member.out_features, member.n_stored, spec.value_dtype)
    stored = {}
    for local, (shape, dtype) in layout.items():
        stored[local] = _get(tensors, f"{member.name}.{local}")
        expect(local, stored[local], shape, dtype)
    return PackedCoefficients(spec.format, spec.n_atoms, member.out_features, spec.value_dtype, stored)


def group_bits(
    in_features: int, n_atoms: int, out_features: Sequence[int], n_nonzero: int, format: Format, value_dtype: str
) -> int:
    """Count the bits of a group's dictionary and coefficients with ``n_nonzero`` non-zeros in every column."""
    total = dictionary_bits(n_atoms, in_features, dictionary_dtype_of(value_dtype))
    for width in out_features:
        total += format.bits(n_atoms, width, format.count_stored(n_atoms, width, n_nonzero), value_dtype)
    return total


def _count_values(packed: PackedCoefficients) -> int:
    """Count the coefficients of a packed member; 14-bit values are counted from the length of their string."""
    values = packed.tensors["values"]
    if packed.value_dtype != "bfloat14":
        return values.numel()
    return values.numel() * 8 // VALUE_BITS["bfloat14"]


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: missing")
    return tensors[name]
