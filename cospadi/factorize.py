"""One group of layers from weights and Grams to packed tensors and a row of the report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.allocation.budget import GroupShape, Size
from cospadi.calibration.statistics import Gram
from cospadi.errors import NumericalError
from cospadi.factorization import SparseFactorization
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.groups import Group
from cospadi.solvers.base import Problem, Solver
from cospadi.whitening import output_errors, whitening_from_gram
from cospadi.work import GroupRecord


@dataclass(frozen=True)
class Method:
    """How groups are factorised and stored.

    Attributes
    ----------
    solver_name : str
        Registry name, for the report.
    solver : Solver
        The dictionary solver.
    format, value_dtype : str
        How the coefficients are stored.
    damping : float
        See ``whitening_from_gram``.
    seed : int
        Of whatever is random in the solver.
    """

    solver_name: str
    solver: Solver
    format: str
    value_dtype: str
    damping: float
    seed: int


def factorize_group(
    group: Group,
    size: Size,
    weights: Sequence[Tensor],
    biases: Mapping[str, Tensor],
    grams: Mapping[str, Gram],
    method: Method,
) -> GroupRecord:
    """Whiten, solve and pack one group of layers.

    Parameters
    ----------
    group : Group
        The layers.
    size : Size
        Atoms and non-zeros.
    weights : sequence of Tensor, shape (in_features, out_features), floating
        W of each member, in the group's order; not modified.
    biases : mapping of str to Tensor
        By member, for those that have one.
    grams : mapping of str to Gram
        By the ``source`` of each member.
    method : Method
        Solver, format, damping, seed.

    Returns
    -------
    GroupRecord
        The tensors as stored, and the report's row: sizes, bytes, the relative output error of each member, and
        whatever had to be repaired.

    Raises
    ------
    NumericalError
        NaN or infinity; the text names the layer.
    """
    for layer, weight in zip(group.layers, weights, strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{layer.name}: the weight holds NaN or infinity")
    # One Gram for layers with a common input; the average for layers with inputs of their own (arXiv 2509.22075, A.4).
    sources = [grams[layer.source] for layer in group.layers]
    distinct = {id(gram): gram for gram in sources}
    gram = sum((one.matrix for one in distinct.values()), torch.zeros_like(sources[0].matrix)) / len(distinct)
    n_tokens = sum(one.n_tokens for one in distinct.values())
    whitening = whitening_from_gram(gram, n_tokens, method.damping, group.name)
    target = whitening.whiten(torch.cat(list(weights), dim=1)).to(torch.float32)
    try:
        solution = method.solver.solve(Problem(target, size.n_atoms, size.n_nonzero, seed=method.seed))
    except NumericalError as error:
        raise NumericalError(f"{group.name}: {error}") from error
    dictionary, coefficients = _balance(whitening.unwhiten(solution.dictionary), solution.coefficients)
    parts = coefficients.split(group.out_features, dim=1)
    factorization = SparseFactorization(
        dictionary, {layer.name: part for layer, part in zip(group.layers, parts, strict=True)}
    )
    spec, tensors = pack_group(factorization, method.format, method.value_dtype, biases, group.shared_input)
    stored = unpack_group(spec, tensors)
    members: list[dict[str, Any]] = []
    lost = norm = 0.0
    for layer, weight, own in zip(group.layers, weights, sources, strict=True):
        # The error that counts is that of the numbers as stored, on the layer's own undamped Gram.
        squared, scale = output_errors(own.matrix, weight, stored.to_dense(layer.name))
        lost, norm = lost + squared, norm + scale
        size_bytes = sum(t.nbytes for key, t in tensors.items() if key.startswith(f"{layer.name}."))
        bias_bytes = sum(t.nbytes for key, t in tensors.items() if key == f"{layer.name}.bias")
        members.append(
            {
                "name": layer.name,
                "out_features": layer.out_features,
                "relative_error": (squared / scale) ** 0.5 if scale > 0 else 0.0,
                "bytes": size_bytes - bias_bytes,
            }
        )
    shape = GroupShape(group.in_features, group.out_features)
    paper_bits = 16 * size.n_atoms * group.in_features + 16 * sum(m.n_stored for m in spec.members)
    row = {
        "name": group.name,
        "members": members,
        "in_features": group.in_features,
        "n_atoms": size.n_atoms,
        "n_nonzero": size.n_nonzero,
        "solver": method.solver_name,
        "status": solution.status.value,
        "statistics": solution.statistics,
        "damping": whitening.damping,
        "note": whitening.note,
        "relative_error": (lost / norm) ** 0.5 if norm > 0 else 0.0,
        "bytes": sum(m["bytes"] for m in members),
        "dense_bytes": shape.dense_bits // 8,
        "paper_bytes": paper_bits // 8,
    }
    return GroupRecord(spec, tensors, row)


def _balance(dictionary: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each atom by a power of two so that its largest entry lies in [1, 2): exact, and safe in float16."""
    largest = dictionary.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.floor(torch.log2(largest)))
    return dictionary / scale, coefficients * scale[:, None].to(coefficients.dtype)
