"""Factorise or quantise one group of layers: whiten, solve, round, pack, and measure what was lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cospadi.allocation import Choice, Factors, GroupPlan, Method, Quantized
from cospadi.arrays import convert
from cospadi.errors import NumericalError
from cospadi.formats import GRIDS, SparseFactorization, dequantize, grid_of, pack_group, unpack_group
from cospadi.models import Group
from cospadi.pipeline.records import GroupRecord
from cospadi.reporting import GroupRow, MemberRow
from cospadi.solvers import HTP, SharedHTP, SharedProblem, Status, sparsify
from cospadi.solvers.rounding import RoundedRows, quantize_dense, round_factors
from cospadi.whitening import Objective, output_errors, whitening_from_gram


@dataclass(frozen=True)
class Approximation:
    """Factors or rounded weights in full precision or on their grid, and what was done."""

    factorization: SparseFactorization
    status: str
    statistics: dict[str, Any]


def factorize_group(
    plan: GroupPlan,
    objective: Objective,
    plain_grams: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    method: Method,
) -> GroupRecord:
    """Approximate and pack one group of layers.

    Parameters
    ----------
    plan : GroupPlan
        The layers and how to store them; one layer alone when it is quantised.
    objective : Objective
        Its weights and metrics.
    plain_grams : mapping of str to Tensor, shape (in_features, in_features)
        ``X^T X`` by the ``source`` of each member, for the reported errors.
    biases : mapping of str to Tensor
        By member, for those that have one.
    method : Method
        Solver, format, seed.

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
    group, choice = plan.group, plan.choice
    if isinstance(choice, Factors):
        found = rounded(choice, approximate(choice, objective, group, method), objective)
        objective.release()
        spec, tensors = pack_group(
            found.factorization,
            method.format,
            choice.value_dtype,
            biases,
            group.shared_input,
            choice.dictionary_dtype,
        )
    else:
        found = _quantize(choice, objective, group)
        (dtype,) = choice.dtypes
        spec, tensors = pack_group(found.factorization, "identity", "none", biases, True, dtype)
    stored = unpack_group(spec, tensors)
    approximations = {layer.name: stored.to_dense(layer.name) for layer in group.layers}
    members: list[MemberRow] = []
    lost = norm = 0.0
    parts = objective.weight.split(objective.widths, dim=1)
    for layer, weight in zip(group.layers, parts, strict=True):
        # The error that counts is that of the numbers as stored, on the layer's own undamped Gram.
        squared, scale = output_errors(plain_grams[layer.source], weight, approximations[layer.name])
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
    factors = choice if isinstance(choice, Factors) else None
    row: GroupRow = {
        "name": group.name,
        "kind": choice.kind,
        "members": members,
        "in_features": group.in_features,
        "n_atoms": factors.n_atoms if factors else None,
        "n_nonzero": factors.n_nonzero if factors else None,
        "side": factors.side if factors else None,
        "value_dtype": choice.value_dtype if isinstance(choice, Factors) else choice.dtypes[0],
        "dictionary_dtype": spec.dictionary_dtype,
        "solver": {"factors": method.solver_name, "sparse": "sparse-weight", "quantized": "gptq"}[choice.kind],
        "status": found.status,
        "statistics": found.statistics,
        "damping": objective.whitening.damping,
        "note": objective.whitening.note,
        "relative_error": (lost / norm) ** 0.5 if norm > 0 else 0.0,
        "predicted_loss_increase": plan.predicted,
        "loss_increase": objective.loss_increase(
            torch.cat([approximations[layer.name] for layer in group.layers], dim=1)
        ),
        "bytes": sum(m["bytes"] for m in members),
        "dense_bytes": 2 * group.in_features * sum(group.out_features),
        "paper_bytes": _paper_bytes(choice, group, sum(m.n_stored for m in spec.members), members),
    }
    return GroupRecord(spec, tensors, row)


def approximate(choice: Factors, objective: Objective, group: Group, method: Method) -> Approximation:
    """Solve for the factors of a group.

    Raises
    ------
    NumericalError
        The solver met NaN or infinity; the text names the group.
    """
    if choice.dictionary_dtype == "none":
        return _sparsify(choice, objective, group)
    if isinstance(method.solver, HTP) and len({id(gram) for gram in objective.grams}) > 1:
        return _share(choice, objective, group, method)
    transposed = choice.side == "output"
    make = objective.transposed_problem if transposed else objective.problem
    problem = make(choice.n_atoms, choice.n_nonzero, method.seed)
    objective.release()
    try:
        solution = method.solver.solve(problem)
    except NumericalError as error:
        raise NumericalError(f"{group.name}: {error}") from error
    del problem
    coefficients = solution.coefficients
    if transposed:
        dictionary = solution.dictionary.to(torch.float64) / objective.scales[:, None]
    else:
        dictionary = objective.whitening.unwhiten(solution.dictionary)
        objective.release()
    dictionary, coefficients = _balance(dictionary, coefficients)
    widths = (group.in_features,) if transposed else group.out_features
    parts = coefficients.split(widths, dim=1)
    factorization = SparseFactorization(
        dictionary, {layer.name: part for layer, part in zip(group.layers, parts, strict=True)}, side=choice.side
    )
    return Approximation(factorization, solution.status.value, dict(solution.statistics))


def _share(choice: Factors, objective: Objective, group: Group, method: Method) -> Approximation:
    """Solve for one dictionary of layers with different inputs, each in the metric of its own input.

    Other solvers see the average of the Grams, as arXiv 2509.22075 does.
    """
    places: dict[int, list[int]] = {}
    for index, gram in enumerate(objective.grams):
        places.setdefault(id(gram), []).append(index)
    weights = objective.weight.to(torch.float32).split(objective.widths, dim=1)
    columns = objective.scales.square().split(objective.widths)
    whitenings = [
        whitening_from_gram(objective.grams[own[0]], objective.n_tokens, objective.damping, group.layers[own[0]].name)
        for own in places.values()
    ]
    problem = SharedProblem(
        tuple(torch.cat([weights[i] for i in own], dim=1) for own in places.values()),
        tuple(whitening.factor for whitening in whitenings),
        choice.n_atoms,
        choice.n_nonzero,
        column_weights=tuple(torch.cat([columns[i] for i in own]) for own in places.values()),
        seed=method.seed,
    )
    solution = SharedHTP(start=method.solver).solve(problem)
    dictionary, joined = _balance(solution.dictionary, torch.cat(list(solution.coefficients), dim=1))
    order = [index for own in places.values() for index in own]
    parts = dict(zip(order, joined.split([objective.widths[i] for i in order], dim=1), strict=True))
    coefficients = {layer.name: parts[index] for index, layer in enumerate(group.layers)}
    notes = "; ".join(sorted({whitening.note for whitening in whitenings if whitening.note}))
    statistics = dict(solution.statistics) | ({"repaired": notes} if notes else {})
    return Approximation(SparseFactorization(dictionary, coefficients), solution.status.value, statistics)


def _sparsify(choice: Factors, objective: Objective, group: Group) -> Approximation:
    """Keep the most useful entries of the weight itself: the dictionary is the identity."""
    library = "numpy" if objective.weight.device.type == "cpu" else "torch"
    weight, metric, scales = (
        convert(matrix.to(torch.float32), library) for matrix in (objective.weight, objective.metric, objective.scales)
    )
    objective.release()
    coefficients = convert(sparsify(weight, metric, choice.n_nonzero * weight.shape[1], scales), "torch")
    identity = torch.eye(group.in_features, dtype=coefficients.dtype, device=coefficients.device)
    parts = coefficients.split(group.out_features, dim=1)
    factorization = SparseFactorization(
        identity, {layer.name: part for layer, part in zip(group.layers, parts, strict=True)}
    )
    return Approximation(factorization, Status.MAX_ITERATIONS.value, {})


def rounded(choice: Factors, found: Approximation, objective: Objective) -> Approximation:
    """Put factors on the grids of their dtypes, each making up for the rounding of the other.

    Floating dtypes are left to the packing, whose rounding costs next to nothing; so are factors of the transpose and
    sparse weights.
    """
    free = found.factorization
    on_grids = grid_of(choice.value_dtype) or grid_of(choice.dictionary_dtype)
    if not on_grids or choice.side == "output" or choice.dictionary_dtype == "none":
        return found
    device = objective.weight.device
    # The loops of the rounding are compiled for the CPU.
    stored = round_factors(
        objective.whitening.factor.cpu(),
        objective.target.cpu(),
        free.dictionary.cpu(),
        torch.cat(list(free.coefficients.values()), dim=1).cpu(),
        choice.dictionary_dtype,
        choice.value_dtype,
        column_weights=objective.scales.square().cpu(),
    )
    widths = [part.shape[1] for part in free.coefficients.values()]
    parts = stored.to_coefficients().to(device).split(widths, dim=1)
    scales = None
    if stored.coefficient_scales is not None:
        scales = dict(zip(free.coefficients, stored.coefficient_scales.to(device).split(widths), strict=True))
    dictionary_scales = None if stored.dictionary_scales is None else stored.dictionary_scales.to(device)
    factorization = SparseFactorization(
        stored.to_dictionary().to(device), dict(zip(free.coefficients, parts, strict=True)), dictionary_scales, scales
    )
    return Approximation(factorization, found.status, found.statistics | {"rounding": stored.statistics["rounding"]})


def _quantize(choice: Quantized, objective: Objective, group: Group) -> Approximation:
    (layer,) = group.layers
    objective.release()
    rows, weight = rounded_weight(objective, choice.dtypes[0])
    factorization = SparseFactorization.of_weight(layer.name, weight, rows.scales.to(weight.device))
    return Approximation(factorization, "closed form: nothing to iterate", dict(rows.statistics))


def rounded_weight(objective: Objective, dtype: str) -> tuple[RoundedRows, Tensor]:
    """Round the weight itself, on the CPU; give its rows on the grid, and what they stand for where the weight is."""
    rows = quantize_dense(objective.weight.T.cpu(), objective.metric.cpu(), dtype)
    return rows, dequantize(rows.values, rows.scales, GRIDS[dtype]).T.to(objective.weight.device)


def _paper_bytes(choice: Choice, group: Group, n_stored: int, members: list[MemberRow]) -> int:
    """Count by the paper's convention: 16 bits for each number of the factors, no mask."""
    if isinstance(choice, Quantized):
        return sum(int(member["bytes"]) for member in members)
    side = group.in_features if choice.side == "input" else sum(group.out_features)
    return 2 * ((0 if choice.kind == "sparse" else choice.n_atoms * side) + n_stored)


def _balance(dictionary: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each atom by a power of two so that its largest entry lies in [1, 2): exact, and safe in float16."""
    largest = dictionary.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    scale = torch.exp2(torch.floor(torch.log2(largest)))
    return dictionary / scale, coefficients * scale[:, None].to(coefficients.dtype)
