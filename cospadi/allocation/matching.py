"""Which groups should share a dictionary: how far apart two groups are, and the pairs that are closest in all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cospadi.calibration import Gram
from cospadi.errors import UsageError
from cospadi.models import Group, in_order
from cospadi.whitening import whitening_from_gram


def pair_distances(
    groups: Sequence[Group],
    weights: Mapping[str, Tensor],
    grams: Mapping[str, Gram],
    sensitivities: Mapping[str, Tensor] | None = None,
    measure: Literal["subspace", "window"] = "subspace",
    rank: float = 0.5,
    reach: int | None = None,
    damping: float = 1e-6,
) -> Tensor:
    """Give how much two groups would lose by sharing a dictionary, for all pairs of the same kinds of layers.

    Parameters
    ----------
    groups : sequence of Group
        Of equal input width within each; for example natural ones.
    weights : mapping of str to Tensor, shape (in_features, out_features)
        W by layer name; not modified.
    grams : mapping of str to Gram
        By the ``source`` of each layer.
    sensitivities : mapping of str to Tensor, shape (out_features,), optional
        Weights of the squared errors of the output columns, by layer name.
    measure : {"subspace", "window"}
        ``subspace``: how much more the two lose in one subspace of the input space than in one each, each measured
        in its own metric; without sensitivities relative to each group's energy.  ``window``: GeoPair's distance of
        whitened weights, see ``window_distance``; for groups with one input each.
    rank : float
        Dimensions of the subspace as a fraction of the input width, 0 < rank < 1; about n_atoms / in_features.
    reach : int, optional
        Only pairs whose last blocks are at most that far apart are measured; all if not given.
    damping : float
        See ``whitening_from_gram``.

    Returns
    -------
    Tensor, shape (n_groups, n_groups), float64
        Symmetric; infinite on the diagonal and where two groups are no candidates: other kinds of layers, another
        input width, or out of reach.

    Raises
    ------
    UsageError
        An option is out of range, or the window measure is asked of groups with several inputs.
    """
    if measure not in ("subspace", "window"):
        raise UsageError(f"measure={measure!r}: expected 'subspace' or 'window'")
    if not 0 < rank < 1:
        raise UsageError(f"rank={rank}: expected a fraction between 0 and 1")
    candidates = [
        (i, j)
        for j, second in enumerate(groups)
        for i, first in enumerate(groups[:j])
        if (first.kinds, first.in_features) == (second.kinds, second.in_features)
        and (reach is None or abs(first.last_block - second.last_block) <= reach)
    ]
    distances = torch.full((len(groups), len(groups)), math.inf, dtype=torch.float64)
    involved = sorted({index for pair in candidates for index in pair})
    if measure == "window":
        for index in involved:
            if not groups[index].shared_input:
                raise UsageError(f"group {groups[index].name} has several inputs: the window measure is for one each")
    views = {index: _inputs_of(groups[index], weights, grams, sensitivities, damping) for index in involved}
    if measure == "window":
        for i, j in candidates:
            distances[i, j] = distances[j, i] = window_distance(views[i][0].target, views[j][0].target)
        return distances
    if sensitivities is None:  # nothing says what an error costs: every group counts the same
        for index, inputs in views.items():
            energy = sum(float(view.target.square().sum()) for view in inputs)
            views[index] = [view.scaled(energy**-0.5 if energy > 0 else 1.0) for view in inputs]
    alone = {index: _subspace_error(views[index], rank) for index in involved}
    for i, j in candidates:
        together = _subspace_error([*views[i], *views[j]], rank)
        distances[i, j] = distances[j, i] = max(together - alone[i] - alone[j], 0.0)
    return distances


def match_groups(groups: Sequence[Group], distances: Tensor, limit: float | None = None) -> list[Group]:
    """Join groups to the pairs that have the least sum of distances: a matching of maximum weight (Edmonds 1965).

    As many pairs as possible are formed; the other groups stay as they are.  Applied to its own result it makes groups
    of four, and so on.

    Parameters
    ----------
    groups : sequence of Group
        In the order of the model.
    distances : Tensor, shape (n_groups, n_groups)
        Symmetric; infinite for pairs that must not be formed, see ``pair_distances``.
    limit : float, optional
        Pairs further apart are not formed either.

    Returns
    -------
    list of Group
        In the order in which their last inputs are seen.

    Raises
    ------
    UsageError
        The distances do not fit the groups or hold NaN.
    """
    import networkx

    if tuple(distances.shape) != (len(groups), len(groups)):
        raise UsageError(f"distances of shape {tuple(distances.shape)} for {len(groups)} groups")
    if bool(torch.isnan(distances).any()):
        raise UsageError("the distances hold NaN")
    allowed = math.inf if limit is None else limit
    edges = [
        (i, j, float(distances[i, j]))
        for j in range(len(groups))
        for i in range(j)
        if math.isfinite(distances[i, j]) and distances[i, j] <= allowed
    ]
    graph = networkx.Graph()
    longest = max((length for _, _, length in edges), default=0.0)
    graph.add_weighted_edges_from((i, j, longest - length) for i, j, length in edges)
    pairs = {tuple(sorted(pair)) for pair in networkx.max_weight_matching(graph, maxcardinality=True)}
    paired = {index for pair in pairs for index in pair}
    joined = [Group((*groups[i].layers, *groups[j].layers)) for i, j in sorted(pairs)]
    return in_order(joined + [group for index, group in enumerate(groups) if index not in paired])


def window_distance(first: Tensor, second: Tensor) -> float:
    """Give the least relative distance of the narrower matrix to as many neighbouring columns of the wider one.

    ``min_k ||V[:, k : k + n] - U|| / ||U||`` for whitened weights U and V, n the width of U (GeoPair, equation 7); U is
    the first one if the widths are equal.

    Parameters
    ----------
    first, second : Tensor, shapes (in_features, n_1) and (in_features, n_2)
        Of a width each.
    """
    narrow, wide = sorted((first, second), key=lambda matrix: matrix.shape[1])
    n = narrow.shape[1]
    products = narrow.T @ wide
    running = torch.cat([wide.new_zeros(1), wide.square().sum(dim=0).cumsum(dim=0)])
    own = float(narrow.square().sum())
    squares = [
        own + float(running[k + n] - running[k]) - 2 * float(products.diagonal(k).sum())
        for k in range(wide.shape[1] - n + 1)
    ]
    return (max(min(squares), 0.0) / own) ** 0.5 if own > 0 else 0.0


@dataclass(frozen=True)
class _Input:
    """One input of a group: the factor L of its Gram, the weights W that it meets (columns weighted), and L^T W."""

    factor: Tensor
    weight: Tensor
    target: Tensor

    def scaled(self, scale: float) -> "_Input":
        return _Input(scale * self.factor, self.weight, scale * self.target)


def _inputs_of(
    group: Group,
    weights: Mapping[str, Tensor],
    grams: Mapping[str, Gram],
    sensitivities: Mapping[str, Tensor] | None,
    damping: float,
) -> list[_Input]:
    inputs = []
    for layers in group.inputs:
        gram = grams[layers[0].source]
        whitening = whitening_from_gram(gram.matrix, gram.n_tokens, damping, layers[0].source)
        factor = whitening.factor
        weight = torch.cat([weights[layer.name] for layer in layers], dim=1).to(factor)
        if sensitivities is not None:
            columns = torch.cat([sensitivities[layer.name] for layer in layers]).to(factor)
            weight = weight * columns.clamp_min(0).sqrt()
        # The size of the weight goes into the factor, so that the input has its say in the averaged metric.
        size = float(weight.square().mean().sqrt()) or 1.0
        factor, weight = factor * size, weight / size
        inputs.append(_Input(factor, weight, factor.T @ weight))
    return inputs


def _subspace_error(inputs: Sequence[_Input], rank: float) -> float:
    """Give the error of all inputs' weights in one subspace of the common input space, each in its own metric.

    The subspace is the best one in the averaged metric; for one input that is the best of all (truncated SVD).  With
    L the factor of the sum of the Grams, it is spanned by the leading eigenvectors U of the sum of ``c_l T_l T_l^T``,
    where ``T_l = L^T W_l`` and c_l is the mean eigenvalue of the relative metric ``R_l^T R_l``; an input then loses
    what its target has outside of the range of ``R_l U``.
    """
    d = inputs[0].factor.shape[0]
    n = max(1, min(d - 1, round(rank * d)))
    Q, upper = torch.linalg.qr(torch.cat([view.factor.T for view in inputs]))
    roots = Q.split(d)
    energy = torch.zeros_like(roots[0])
    for R, view in zip(roots, inputs, strict=True):
        T = upper @ view.weight
        energy += float(R.square().sum()) / d * (T @ T.T)
    U = torch.linalg.eigh(energy).eigenvectors[:, -n:]
    lost = 0.0
    for R, view in zip(roots, inputs, strict=True):
        basis = torch.linalg.qr(R @ U).Q
        lost += float((view.target - basis @ (basis.T @ view.target)).square().sum())
    return lost
