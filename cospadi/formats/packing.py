"""A factorised group to the tensors of a checkpoint, and back."""

from collections.abc import Mapping, Sequence, Sized

from torch import Tensor

from cospadi.errors import CheckpointError, NumericalError, UsageError
from cospadi.formats.base import FORMATS, Format, PackedCoefficients, PackedDictionary
from cospadi.formats.dictionary import (
    dictionary_bits,
    dictionary_dtype_of,
    dictionary_layout,
    dictionary_tensors,
    pack_dictionary,
    packed_dictionary,
    unpack_dictionary,
)
from cospadi.formats.factorization import GroupSpec, MemberSpec, Side, SparseFactorization
from cospadi.formats.quantization import grid_of
from cospadi.formats.values import expect


def pack_group(
    factorization: SparseFactorization,
    format: str,
    value_dtype: str,
    biases: Mapping[str, Tensor],
    shared_input: bool,
    dictionary_dtype: str | None = None,
) -> tuple[GroupSpec, dict[str, Tensor]]:
    """Give a group's description and its tensors by checkpoint name.

    Parameters
    ----------
    factorization : SparseFactorization
        Dictionary and coefficients; not modified.  What lies on the grid of the scales that it has is stored exactly.
    format, value_dtype : str
        Registry name of the format and one of its value dtypes.
    biases : mapping of str to Tensor, shape (out_features,)
        By member, for those that have one; stored in their own dtype.
    shared_input : bool
        Whether the members receive the same input tensor.
    dictionary_dtype : str, optional
        One of ``DICTIONARY_DTYPES``; that of ``dictionary_dtype_of`` if not given.

    Raises
    ------
    UsageError
        Unknown format, or one that does not store the value dtype or these coefficients; unknown dictionary dtype;
        scales for a floating dtype; several members in the format ``identity``.
    NumericalError
        A number is not finite or overflows; names the member.
    """
    codec = FORMATS.create(format)
    dictionary_dtype = dictionary_dtype or dictionary_dtype_of(value_dtype)
    require_sharing(codec, factorization.coefficients, factorization.side)
    transposed = factorization.side == "output"
    scales = factorization.coefficient_scales or {}
    tensors: dict[str, Tensor] = {}
    members: list[MemberSpec] = []
    for name, coefficients in factorization.coefficients.items():
        if not members:
            try:
                stored = factorization.dictionary.T if transposed else factorization.dictionary
                require_held(codec, dictionary_dtype, factorization.side)
                atoms = pack_dictionary(stored, dictionary_dtype, factorization.dictionary_scales)
            except NumericalError as error:
                raise NumericalError(f"{name}.dictionary: {error}") from error
            tensors.update({f"{name}.{local}": tensor for local, tensor in dictionary_tensors(atoms).items()})
        try:
            matrix = coefficients.T if transposed else coefficients
            packed = codec.pack(matrix.detach(), value_dtype, scales.get(name))
        except NumericalError as error:
            raise NumericalError(f"{name}: the coefficients: {error}") from error
        tensors.update({f"{name}.{local}": tensor for local, tensor in packed.tensors.items()})
        if name in biases:
            tensors[f"{name}.bias"] = biases[name].detach().clone().contiguous()
        out_features = factorization.dictionary.shape[0] if transposed else coefficients.shape[1]
        members.append(MemberSpec(name, out_features, codec.n_stored(packed), name in biases))
    spec = GroupSpec(
        in_features=factorization.in_features,
        n_atoms=factorization.n_atoms,
        members=tuple(members),
        format=format,
        value_dtype=value_dtype,
        dictionary_dtype=dictionary_dtype,
        shared_input=shared_input,
        side=factorization.side,
    )
    return spec, tensors


def unpack_group(spec: GroupSpec, tensors: Mapping[str, Tensor]) -> SparseFactorization:
    """Give the factorisation that the tensors of a group hold.

    It is in the stored dtypes, but bfloat16 for ``bfloat14`` and float32, with their scales, for whole numbers; packed
    again in the same dtypes it gives the same tensors.

    Raises
    ------
    CheckpointError
        A tensor is missing or does not fit the description; names it.
    """
    owner = packed_owner(spec, tensors)
    atoms = unpack_dictionary(owner)
    codec = FORMATS.create(spec.format)
    coefficients, scales = {}, {}
    for member in spec.members:
        try:
            packed = packed_member(spec, member, tensors)
            matrix = codec.unpack(packed)
            coefficients[member.name] = matrix.T if spec.side == "output" else matrix
            check_count(member, packed)
        except CheckpointError as error:
            raise CheckpointError(f"{member.name}.{error}") from error
        if grid_of(spec.value_dtype) is not None:
            scales[member.name] = packed.tensors["scales"]
    dictionary = atoms if spec.side == "output" else atoms.T
    return SparseFactorization(dictionary, coefficients, owner.scales, scales or None, spec.side)


def packed_owner(spec: GroupSpec, tensors: Mapping[str, Tensor]) -> PackedDictionary:
    """Gather the stored dictionary of a group from tensors by checkpoint name and check it.

    Raises
    ------
    CheckpointError
        A tensor is missing or does not fit the description; names it.
    """
    names = dictionary_layout(*spec.dictionary_shape, spec.dictionary_dtype)
    own = {local: tensors[f"{spec.name}.{local}"] for local in names if f"{spec.name}.{local}" in tensors}
    try:
        return packed_dictionary(own, *spec.dictionary_shape, spec.dictionary_dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{spec.name}.{error}") from error


def packed_member(spec: GroupSpec, member: MemberSpec, tensors: Mapping[str, Tensor]) -> PackedCoefficients:
    """Gather the stored coefficients of one member from tensors by checkpoint name."""
    rows, columns = spec.coefficients_shape(member)
    layout = FORMATS.create(spec.format).layout(rows, columns, member.n_stored, spec.value_dtype)
    stored = {}
    for local, (shape, dtype) in layout.items():
        stored[local] = _get(tensors, f"{member.name}.{local}")
        expect(local, stored[local], shape, dtype)
    return PackedCoefficients(spec.format, rows, columns, spec.value_dtype, stored)


def check_count(member: MemberSpec, packed: PackedCoefficients) -> None:
    """Refuse checked coefficients of another number than the description says; strings of bits leave it open.

    Raises
    ------
    CheckpointError
        With both numbers.
    """
    count = FORMATS.create(packed.format).n_stored(packed)
    if count != member.n_stored:
        raise CheckpointError(f"values: {count} coefficients are stored, the description says {member.n_stored}")


def require_sharing(format: Format, members: Sized, side: Side) -> None:
    """Refuse several members where each layer has a dictionary of its own, and sides that a format does not have.

    Raises
    ------
    UsageError
        With their number, or the format.
    """
    if format.is_identity and side == "output":
        raise UsageError(f"format {format.name!r} has its dictionary on the side 'input', found side 'output'")
    if format.is_identity and len(members) != 1:
        raise UsageError(f"format {format.name!r} has one layer in a group, found {len(members)}")
    if side == "output" and len(members) != 1:
        raise UsageError(f"side 'output' has one layer in a group, found {len(members)}")


def require_held(format: Format, dictionary_dtype: str, side: Side) -> None:
    """Refuse a group of which nothing would be stored, and an identity on the side of the outputs.

    Raises
    ------
    UsageError
        With what was given.
    """
    if dictionary_dtype == "none" and (format.is_identity or side == "output"):
        raise UsageError(f"dictionary dtype 'none' does not go with format {format.name!r} on side {side!r}")


def group_bits(
    in_features: int,
    n_atoms: int,
    out_features: Sequence[int],
    n_nonzero: int,
    format: Format,
    value_dtype: str,
    dictionary_dtype: str | None = None,
    side: Side = "input",
) -> int:
    """Count the bits of a group's dictionary and coefficients with ``n_nonzero`` non-zeros in every column of S.

    Parameters
    ----------
    in_features, out_features : int and sequence of int
        Of the layers themselves, whatever the side.
    n_atoms, n_nonzero : int
    format : Format
    value_dtype : str
    dictionary_dtype : str, optional
        That of ``dictionary_dtype_of`` if not given.
    side : {"input", "output"}
        Of the dictionary; S has a column for each output, or for each input if that is ``output``.

    Raises
    ------
    UsageError
        Several members, or the format ``identity``, on the side ``output``.
    """
    require_sharing(format, out_features, side)
    dictionary_dtype = dictionary_dtype or dictionary_dtype_of(value_dtype)
    if side == "output":
        n_stored = format.count_stored(n_atoms, in_features, n_nonzero)
        stored = format.bits(in_features, n_atoms, n_stored, value_dtype)
        return dictionary_bits(out_features[0], n_atoms, dictionary_dtype) + stored
    total = dictionary_bits(n_atoms, in_features, dictionary_dtype)
    for width in out_features:
        total += format.bits(n_atoms, width, format.count_stored(n_atoms, width, n_nonzero), value_dtype)
    return total


def _get(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{name}: missing")
    return tensors[name]
