"""Dictionary and coefficients rounded together, each making up for the rounding of the other.

The finding behind the order of the steps: coefficients that are refitted on their support to the rounded dictionary
absorb whatever error lies in the span of their atoms.  So the dictionary is rounded in the metric of what they cannot
absorb, where rounding it in the metric of the Gram itself may end worse than rounding it to nearest.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cospadi.errors import NumericalError, UsageError
from cospadi.formats import dequantize, grid_of, quantize, round_values
from cospadi.solvers.conjugate_gradients import conjugate_gradients
from cospadi.solvers.rounding.coefficients import require_column_scales, round_coefficients
from cospadi.solvers.rounding.gptq import round_rows
from cospadi.solvers.rounding.scales import power_of_two, search_scales
from cospadi.solvers.updates import least_squares_dictionary, unit_columns

_REFIT_STEPS = 10
_SAMPLED_COLUMNS = 32
_KEPT = (0.02, 0.3)
"""Share of the Gram's own metric in the first rounding of the dictionary, and in those after: the support that is
refitted then starts from coefficients which have been rounded already and move less."""
_BALANCES = (0.0, 0.5, 0.75, 1.0)
"""Exponents of the size of a row of S that its atom may take over."""
_BALANCE_COLUMNS = 256


@dataclass(frozen=True)
class RoundedFactors:
    """A factorisation in the numbers that are stored.

    Attributes
    ----------
    dictionary : Tensor, shape (n_atoms, in_features)
        Atoms as rows: int8 whole numbers, or floating in the holding dtype.
    dictionary_scales : Tensor or None
        ``scale_shape(n_atoms, in_features, grid)``; None for a floating dtype.
    coefficients : Tensor, shape (out_features, n_atoms)
        S^T, likewise; zero outside the support, and where a coefficient was rounded to zero.
    coefficient_scales : Tensor, shape (out_features,), or None
    dictionary_dtype, value_dtype : str
    statistics : dict
        ``relative_error`` (root of the weighted squared whitened error over that of zero), ``nearest_error`` of
        rounding both factors to nearest, ``refit_error`` of rounding both to nearest with a refit in between,
        ``unrounded_error``; ``rounding``: what was best of ``nearest``, ``refit`` and ``round 0``, ``round 1``, ...
    """

    dictionary: Tensor
    dictionary_scales: Tensor | None
    coefficients: Tensor
    coefficient_scales: Tensor | None
    dictionary_dtype: str
    value_dtype: str
    statistics: dict[str, float | int | str] = field(default_factory=dict)

    def to_dictionary(self) -> Tensor:
        """Give D as every reader sees it, shape (in_features, n_atoms), float32."""
        return _meaning(self.dictionary, self.dictionary_scales, self.dictionary_dtype).T

    def to_coefficients(self) -> Tensor:
        """Give S as every reader sees it, shape (n_atoms, out_features), float32."""
        return _meaning(self.coefficients, self.coefficient_scales, self.value_dtype).T


def round_factors(
    factor: Tensor,
    target: Tensor,
    dictionary: Tensor,
    coefficients: Tensor,
    dictionary_dtype: str,
    value_dtype: str,
    *,
    column_weights: Tensor | None = None,
    alternations: int = 2,
    sweeps: int = 2,
) -> RoundedFactors:
    """Round D and S with a small sum_j f_j ||y_j - L^T D s_j||^2.

    First the sizes of the atoms and of the rows of S are balanced, which changes nothing but what the common scale of a
    column costs.  Then, ``alternations`` times over and once: D is rounded (its error in the span of the atoms that
    code a column counts little), S refitted on its support by conjugate gradients, S rounded, and D replaced by the
    least-squares dictionary of the rounded S.  The best of all is returned.

    Laws: the error is never above that of rounding both factors to nearest, nor above that with a refit of S between.

    Parameters
    ----------
    factor : Tensor, shape (in_features, in_features), floating, on the CPU
        L, lower triangular.
    target : Tensor, shape (in_features, out_features)
        Y = L^T W.
    dictionary : Tensor, shape (in_features, n_atoms)
        D, not whitened.
    coefficients : Tensor, shape (n_atoms, out_features)
        S.
    dictionary_dtype, value_dtype : str
        A grid (for the coefficients one without groups) or a floating dtype, each for its factor.
    column_weights : Tensor, shape (out_features,), optional
        f, not negative.
    alternations : int
        Returns to the dictionary.
    sweeps : int
        Of each coordinate descent.

    Raises
    ------
    UsageError
        A grid with groups for the coefficients, or negative ``alternations`` or ``sweeps``.
    NumericalError
        NaN, infinity, or a number that overflows its dtype.
    """
    if alternations < 0 or sweeps < 0:
        raise UsageError(f"alternations={alternations}, sweeps={sweeps}: expected 0 or more")
    value_grid = grid_of(value_dtype)
    if value_grid is not None:
        require_column_scales(value_grid)
    for what, matrix in (("factor", factor), ("target", target), ("dictionary", dictionary), ("S", coefficients)):
        if not bool(torch.isfinite(matrix).all()):
            raise NumericalError(f"the {what} holds NaN or infinity")
    problem = _Problem(
        factor.to(torch.float64),
        target.detach().to(torch.float64),
        torch.ones(target.shape[1], dtype=torch.float64) if column_weights is None else column_weights.double(),
        dictionary_dtype,
        value_dtype,
        sweeps,
    )
    if not bool(torch.isfinite(problem.weights).all()) or bool((problem.weights < 0).any()):
        raise NumericalError("the column weights must be finite and not negative")
    D, S = dictionary.detach().to(torch.float64), coefficients.detach().to(torch.float64)
    norm = float((problem.target.square().sum(dim=0) * problem.weights).sum())

    def relative(D: Tensor, S: Tensor) -> float:
        return (problem.error(D, S) / norm) ** 0.5 if norm > 0 else 0.0

    attempts = dict(problem.attempts(D, S, alternations))
    errors = {name: relative(one.to_dictionary(), one.to_coefficients()) for name, one in attempts.items()}
    best = min(errors, key=lambda name: errors[name])
    statistics: dict[str, float | int | str] = {
        "relative_error": errors[best],
        "nearest_error": errors["nearest"],
        "refit_error": errors["refit"],
        "unrounded_error": relative(D, S),
        "rounding": best,
    }
    return replace(attempts[best], statistics=statistics)


@dataclass(frozen=True)
class _Problem:
    factor: Tensor
    target: Tensor
    weights: Tensor
    dictionary_dtype: str
    value_dtype: str
    sweeps: int

    def error(self, D: Tensor, S: Tensor) -> float:
        """Give the weighted squared error in float64."""
        residual = self.target - (self.factor.T @ D.to(torch.float64)) @ S.to(torch.float64)
        return float((residual.square().sum(dim=0) * self.weights).sum())

    def attempts(self, D: Tensor, S: Tensor, alternations: int) -> Iterator[tuple[str, RoundedFactors]]:
        """Give factors as stored, each with the name of how they were reached."""
        values, scales = _nearest(D.T.contiguous(), self.dictionary_dtype)
        yield "nearest", self._stored(values, scales, *_nearest(S.T.contiguous(), self.value_dtype))
        refitted = self._refit(_meaning(values, scales, self.dictionary_dtype).T, S)
        yield "refit", self._stored(values, scales, *_nearest(refitted.T.contiguous(), self.value_dtype))
        D, S = self._balanced(D, S)
        metric = self._unabsorbed(D, S)
        for round_ in range(alternations + 1):
            values, scales = self._round_dictionary(D, metric, _KEPT[min(round_, 1)])
            rounded = _meaning(values, scales, self.dictionary_dtype).T
            S = self._refit(rounded, S)
            stored = self._stored(values, scales, *self._round_coefficients(rounded, S))
            yield f"round {round_}", stored
            if round_ < alternations:
                D = self._least_squares(stored.to_coefficients(), rounded)

    def _stored(
        self, dictionary: Tensor, scales: Tensor | None, coefficients: Tensor, coefficient_scales: Tensor | None
    ) -> RoundedFactors:
        return RoundedFactors(
            dictionary, scales, coefficients, coefficient_scales, self.dictionary_dtype, self.value_dtype
        )

    def _balanced(self, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
        """Share the sizes of the rows of S with the atoms, as the grid of S likes best.

        With atoms of one size, the few rows of large coefficients set the scale of every column, and the many small
        ones are rounded coarsely.
        """
        grid = grid_of(self.value_dtype)
        if grid is None:
            # Floating coefficients do not care; entries of atoms near one are safe in float16.
            sizes = power_of_two(D.abs().amax(dim=0))
            return D / sizes, S * sizes[:, None]
        A = self.factor.T @ D
        norms = A.square().sum(dim=0).sqrt()
        norms = torch.where(norms > 0, norms, 1.0)
        norms = norms * power_of_two((D / norms).abs().max())
        D, S = D / norms, S * norms[:, None]
        sizes = S.square().mean(dim=1).sqrt()
        sizes = torch.where(sizes > 0, sizes / float(sizes.max().clamp_min(1e-300)), torch.ones_like(sizes))
        step = max(1, S.shape[1] // _BALANCE_COLUMNS)
        best, least = torch.ones_like(sizes), float("inf")
        for exponent in _BALANCES:
            taken = sizes**exponent
            rows = (S[:, ::step] / taken[:, None]).T.contiguous()
            values, scales = quantize(rows, grid, search_scales(rows, grid, taken.square()))
            lost = (rows - dequantize(values, scales, grid)).square() @ taken.square()
            loss = float((lost * self.weights[::step]).sum())
            if loss < least:
                best, least = taken, loss
        return D * best, S / best[:, None]

    def _unabsorbed(self, D: Tensor, S: Tensor) -> Tensor:
        """Give the part of the whitened space that a column's atoms do not span, on average over some columns."""
        A = unit_columns((self.factor.T @ D).to(torch.float32))[0]
        alive = A.square().sum(dim=0) > 0
        step = max(1, S.shape[1] // _SAMPLED_COLUMNS)
        spans = torch.zeros(A.shape[0], A.shape[0], dtype=torch.float32)
        columns = range(0, S.shape[1], step)
        for column in columns:
            span = torch.linalg.qr(A[:, (S[:, column] != 0) & alive]).Q
            spans += span @ span.T
        unspanned = spans.to(torch.float64).div_(-max(1, len(columns)))
        unspanned.diagonal().add_(1.0)
        return unspanned

    def _round_dictionary(self, D: Tensor, metric: Tensor, kept: float) -> tuple[Tensor, Tensor | None]:
        grid = grid_of(self.dictionary_dtype)
        if grid is None:
            return _nearest(D.T.contiguous(), self.dictionary_dtype)
        rounded = round_rows(D.T.contiguous(), self._with_kept(metric, kept), grid, damping=1e-6, sweeps=0)
        return rounded.values, rounded.scales

    def _with_kept(self, metric: Tensor, kept: float) -> Tensor:
        """Give L ((1 - kept) M + kept I) L^T."""
        mixed = metric * (1 - kept)
        mixed.diagonal().add_(kept)
        mixed = self.factor @ mixed
        return mixed @ self.factor.T

    def _refit(self, D: Tensor, S: Tensor) -> Tensor:
        """Lower the error of S on its support; no column's error rises."""
        A, norms = unit_columns((self.factor.T @ D.to(torch.float64)).to(torch.float32))
        Y = self.target.to(torch.float32)
        start = (S * norms[:, None]).to(torch.float32)
        gram = A.T @ A
        refitted = conjugate_gradients(gram, A.T @ (Y - A @ start), start, _REFIT_STEPS)
        better = (Y - A @ refitted).square().sum(dim=0) < (Y - A @ start).square().sum(dim=0)
        refitted = torch.where(better, refitted, start)
        # An atom that was rounded to zero keeps its coefficients, so that its support stays.
        return torch.where((norms > 0)[:, None], refitted / torch.where(norms > 0, norms, 1.0)[:, None], S).double()

    def _round_coefficients(self, D: Tensor, S: Tensor) -> tuple[Tensor, Tensor | None]:
        grid = grid_of(self.value_dtype)
        if grid is None:
            return _nearest(S.T.contiguous(), self.value_dtype)
        rounded = round_coefficients(self.factor.T @ D.double(), self.target, S, grid, sweeps=self.sweeps)
        return rounded.values, rounded.scales

    def _least_squares(self, S: Tensor, previous: Tensor) -> Tensor:
        """Give the D that suits a rounded S best; unused atoms stay."""
        roots = self.weights.sqrt()
        A = least_squares_dictionary(
            self.target * roots, S.to(torch.float64) * roots, self.factor.T @ previous.to(torch.float64)
        )
        return torch.linalg.solve_triangular(self.factor.T, A, upper=True)


def _nearest(rows: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    grid = grid_of(dtype)
    return (round_values(rows, dtype), None) if grid is None else quantize(rows, grid)


def _meaning(values: Tensor, scales: Tensor | None, dtype: str) -> Tensor:
    grid = grid_of(dtype)
    if grid is None:
        return values.to(torch.float32)
    assert scales is not None
    return dequantize(values, scales, grid)
