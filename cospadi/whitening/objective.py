"""What a group's approximation is judged by: the error of its outputs, weighted by the sensitivity of the model's loss.

With g the gradient of the loss at the outputs, the second-order estimate of the increase of the loss when the weight W
becomes V is, per token,

    1/2 tr((W - V)^T G (W - V) F) / n_tokens,    G = sum_t w_t x_t x_t^T,    F = diag(E[g_j^2]),

K-FAC's Kronecker approximation of the Fisher information (Martens, Grosse 2015, arXiv 1503.05671) with F cut to its
diagonal.  Without sensitivities F = I, and the same formula is half the squared output error per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from cospadi.calibration import Gram, SourceStatistics
from cospadi.errors import NumericalError
from cospadi.models import Group
from cospadi.whitening.problem import Problem
from cospadi.whitening.square_root import Whitening, column_errors, corrected_weight, whitening_from_gram

_LEAST_WEIGHT = 1e-6
"""Weight of a column that the loss ignores, as a fraction of the largest: its errors still decide among equals."""


@dataclass(frozen=True)
class Objective:
    """One group's weights and the metrics of its inputs and outputs.

    Attributes
    ----------
    name : str
        Of the group.
    weight : Tensor, shape (in_features, out_features of all members), floating
        W, the members side by side, in the dtype that they came in; all that is computed with it is in float64.
    grams : tuple of Tensor, shape (in_features, in_features), float64
        G of each member (the same object where they share their input), undamped.
    widths : tuple of int
        Output features of each member.
    whitening : Whitening
        Of the members' mean Gram.
    column_weights : Tensor, shape (out_features of all members,), float64, or None
        The diagonal of F.
    n_tokens : int
        Tokens that the Grams sum over.
    damping : float
        With which Grams are repaired, see ``whitening_from_gram``.
    """

    name: str
    weight: Tensor
    grams: tuple[Tensor, ...]
    widths: tuple[int, ...]
    whitening: Whitening
    column_weights: Tensor | None
    n_tokens: int
    damping: float = 1e-6

    @cached_property
    def target(self) -> Tensor:
        """The whitened weight L^T W, shape (in_features, out_features), float32, without the column weights."""
        return self.whitening.whiten(self.weight).to(torch.float32)

    @cached_property
    def scales(self) -> Tensor:
        """Square roots of the column weights, kept above zero; ones without weights."""
        if self.column_weights is None or not bool(self.column_weights.any()):
            return torch.ones(self.weight.shape[1], dtype=torch.float64, device=self.weight.device)
        weights = self.column_weights
        return weights.clamp_min(_LEAST_WEIGHT * float(weights.max())).sqrt()

    def problem(self, n_atoms: int, n_nonzero: int, seed: int = 0) -> Problem:
        """Give the whitened problem with the dictionary on the side of the inputs."""
        weights = None if self.column_weights is None else self.scales.square().to(torch.float32)
        return Problem(self.target, n_atoms, n_nonzero, column_weights=weights, seed=seed)

    def transposed_problem(self, n_atoms: int, n_nonzero: int, seed: int = 0) -> Problem:
        """Give the problem with the dictionary on the side of the outputs: the Gram is then a metric on the columns."""
        target = (self.weight * self.scales).T.to(torch.float32).contiguous()
        return Problem(target, n_atoms, n_nonzero, column_metric=self.metric.to(torch.float32), seed=seed)

    @property
    def metric(self) -> Tensor:
        """The Gram that the whitening stands for, damping included, float64."""
        return self.whitening.metric

    def release(self) -> None:
        """Free what can be computed again, to the same bits: the target and the factor of the whitening."""
        self.__dict__.pop("target", None)
        self.whitening.forget()

    def loss_increases(self, approximation: Tensor) -> list[float]:
        """Give the predicted loss increase per token, in nats, of each member (half the squared error without F).

        Parameters
        ----------
        approximation : Tensor, shape (in_features, out_features of all members)
            V.
        """
        weights, V = self.weight.split(self.widths, dim=1), approximation.split(self.widths, dim=1)
        squares = self.scales.square().split(self.widths)
        n_tokens = max(1, self.n_tokens)
        found = []
        for gram, own, other, square in zip(self.grams, weights, V, squares, strict=True):
            errors = column_errors(gram, partial(_difference, own, other), own.shape[1])
            # Where the Gram is singular, rounding may leave a sum of squares slightly below zero.
            found.append(max(0.5 * float((errors * square).sum()) / n_tokens, 0.0))
        return found

    def loss_increase(self, approximation: Tensor) -> float:
        """Give the sum of ``loss_increases``."""
        return sum(self.loss_increases(approximation))


def build_objective(
    group: Group,
    weights: Sequence[Tensor],
    statistics: Mapping[str, SourceStatistics],
    damping: float,
    *,
    column_weights: bool,
    token_weights: bool = False,
    shift: Tensor | None = None,
    mixing: float = 0.0,
    ridge: float = 0.1,
) -> Objective:
    """Join the weights of a group's layers with what calibration knows of them.

    Parameters
    ----------
    group : Group
        The layers.
    weights : sequence of Tensor, shape (in_features, out_features), floating
        W of each member, in the group's order; not modified.
    statistics : mapping of str to SourceStatistics
        By the ``source`` of each member.
    damping : float
        See ``whitening_from_gram``.
    column_weights : bool
        Weigh the outputs by the sensitivities.
    token_weights : bool
        Take the Gram in which tokens count by their gradients.
    shift, mixing, ridge
        For sequential calibration, see ``corrected_weight``: the weights become those that make up for earlier errors.

    Raises
    ------
    NumericalError
        NaN or infinity in a weight or Gram; the text names the layer.
    """
    for layer, weight in zip(group.layers, weights, strict=True):
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError(f"{layer.name}: the weight holds NaN or infinity")
    sources = [statistics[layer.source] for layer in group.layers]
    distinct = {id(one): one for one in sources}
    kept = {key: _gram(one, token_weights) for key, one in distinct.items()}
    grams = [kept[id(one)] for one in sources]
    # One Gram for layers with a common input; the average for layers with inputs of their own (arXiv 2509.22075, A.4).
    unique = list(kept.values())
    mean = unique[0].matrix
    if len(unique) > 1:
        mean = torch.stack([gram.matrix for gram in unique]).mean(0)
    whitening = whitening_from_gram(mean, sum(gram.n_tokens for gram in unique), damping, group.name)
    sensitivities = None
    if column_weights:
        # Over the tokens that reached the layer: how few they are is in the Gram already.
        moments = [one.layers[layer.name] for one, layer in zip(sources, group.layers, strict=True)]
        sensitivities = torch.cat([moment.squares / max(1, moment.n_tokens) for moment in moments])
    joined = torch.cat(list(weights), dim=1) if len(weights) > 1 else weights[0]
    if shift is not None and mixing > 0:
        joined = corrected_weight(joined, whitening, shift, mixing, ridge)
    return Objective(
        group.name,
        joined,
        tuple(gram.matrix for gram in grams),
        group.out_features,
        whitening,
        sensitivities,
        max(one.n_tokens for one in sources),
        damping,
    )


def _difference(weight: Tensor, approximation: Tensor, columns: slice) -> Tensor:
    return weight[:, columns].to(torch.float64) - approximation[:, columns].to(torch.float64)


def _gram(statistics: SourceStatistics, token_weights: bool) -> Gram:
    if token_weights:
        return statistics.weighted_gram()
    assert statistics.gram is not None
    return statistics.gram
