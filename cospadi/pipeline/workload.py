"""Relative cost of pieces of work, from their sizes: for the time left, and to start the largest first.

Operations are counted in four kinds, each with the time that one took on the core where the constants were fitted
(``benchmarks/progress.py`` tells how well they predict).  The unit is a second there; only ratios mean anything
elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cospadi.allocation import SPARSE, Choice, Factors, Families, GroupPlan, Method, Quantized, sizes
from cospadi.formats import grid_of
from cospadi.solvers import HTP, START_ALTERNATIONS, Solver

_OUTPUT_SHARES = (1.0, 0.6, 0.3)
"""Sizes at which ``profile`` tries dictionaries on the side of the outputs."""
_PRODUCT = 1.8e-11
_DECOMPOSITION = 1.8e-10
_ELEMENT = 5.5e-9
_GRID = 9.3e-10
_UNIT = 5e-3
"""Seconds of one operation of each kind, and what every group costs besides."""


@dataclass(frozen=True)
class _Work:
    """Counts of operations.

    Attributes
    ----------
    product : float
        Multiplications in products of matrices in float32; one in float64 counts twice.
    decomposition : float
        n^3 for the eigenvectors of a matrix of n rows in float64; other factorisations by their time relative to it.
    element : float
        Numbers that a threshold goes through; sums and copies count a tenth.
    grid : float
        Steps of the compiled loops that round numbers one after the other.
    """

    product: float = 0.0
    decomposition: float = 0.0
    element: float = 0.0
    grid: float = 0.0

    def __add__(self, other: "_Work") -> "_Work":
        return _Work(
            self.product + other.product,
            self.decomposition + other.decomposition,
            self.element + other.element,
            self.grid + other.grid,
        )

    def __mul__(self, times: float) -> "_Work":
        return _Work(self.product * times, self.decomposition * times, self.element * times, self.grid * times)

    @property
    def cost(self) -> float:
        return (
            _UNIT
            + _PRODUCT * self.product
            + _DECOMPOSITION * self.decomposition
            + _ELEMENT * self.element
            + _GRID * self.grid
        )


def solving(choice: Choice, in_features: int, out_features: Sequence[int], solver: Solver, n_inputs: int = 1) -> float:
    """Give the cost of solving a group.

    Parameters
    ----------
    choice : Factors or Quantized
        How it is stored.
    in_features : int
    out_features : sequence of int
        Of each member.
    solver : Solver
        The dictionary solver; what is counted is ``HTP``, and others are taken to cost in proportion.
    n_inputs : int
        Distinct inputs of the members; more than one share a dictionary each in its own metric.
    """
    d, n = in_features, sum(out_features)
    return (_objective(d, n) + _approximating(choice, d, out_features, solver, n_inputs) + _judging(d, n)).cost


def of_plan(method: Method, plan: GroupPlan) -> float:
    """Give the cost of solving a group of a plan."""
    group = plan.group
    n_inputs = len({layer.source for layer in group.layers})
    return solving(plan.choice, group.in_features, group.out_features, method.solver, n_inputs)


def profiling(in_features: int, out_features: Sequence[int], families: Families, spectrum: bool = False) -> float:
    """Give the cost of profiling one group; see ``profile_group``."""
    d, n = in_features, sum(out_features)
    least = min(d, n)
    work = _objective(d, n) + _Work(2.0 * d * d * n)
    for side in families.curves(in_features, out_features).values():
        if side == SPARSE:
            work += _Work(9.0 * d * d * n, 0, 3.0 * d * n) * 6
        elif side == "input":
            work += _singular_vectors(d, n) + _Work(least * d * n)
            for k, _ in sizes(d, n, families):
                work += _dictionary(d, n, k) + _Work(d * k * n, 0, 1.0 * (k + 0.3 * d) * n)
        else:
            for k, _ in sizes(n, d, families.for_outputs(), _OUTPUT_SHARES):
                work += _in_metric(n, d, k, 0, 0, 3) + _Work(n * d * (k + d))
    work += _Work(0, 0, 1.0 * d * n) * len(families.quantized)
    return (work + (_singular_vectors(d, n) if spectrum else _Work())).cost


def correcting(in_features: int, out_features: Sequence[int], families: Families, solver: Solver) -> float:
    """Give the cost of one sample of ``measure_corrections``."""
    d, n = in_features, sum(out_features)
    most = min(d, n)
    judging = _Work(2.0 * d * d * n)
    work = _objective(d, n)
    for side in families.curves(in_features, out_features).values():
        if side == SPARSE:
            solves = [Factors(d, round(part * d), dictionary_dtype="none") for part in (0.4, 0.95)]
        else:
            rho = families.middle_rho if families.sparse else 1.0
            pairs = ((most // 2, int(most / 2 / rho)), (most, most))
            solves = [Factors(k, max(1, s), side) for k, s in pairs]  # type: ignore[arg-type]
        for choice in solves:
            work += _factors(choice, d, out_features, solver, 1) + judging
        for value_dtype, dictionary_dtype in families.dtypes:
            dtypes = (value_dtype, "none" if side == SPARSE else dictionary_dtype)
            work += judging + _Work(0, 0, 2.0 * d * n)
            work += _rounding(Factors(most, most, solves[0].side, *dtypes), d, out_features)
    return (work + (_quantizing(d, n) + judging) * len(families.quantized)).cost


def _approximating(choice: Choice, d: int, out_features: Sequence[int], solver: Solver, n_inputs: int) -> _Work:
    if isinstance(choice, Quantized):
        return _quantizing(d, sum(out_features))
    return _factors(choice, d, out_features, solver, n_inputs) + _rounding(choice, d, out_features)


def _objective(d: int, n: int) -> _Work:
    """Whitening and the whitened target."""
    return _Work(2.0 * d * d * n, 0.1 * d**3, 1.0 * d * (d + n))


def _judging(d: int, n: int) -> _Work:
    """Errors of what is stored, and packing."""
    return _Work(6.0 * d * d * n, 0, 2.0 * d * n)


def _factors(choice: Factors, d: int, out_features: Sequence[int], solver: Solver, n_inputs: int) -> _Work:
    n, k = sum(out_features), choice.n_atoms
    if choice.kind == "sparse":
        return _Work(38.0 * d * d * n, 1.0 * d**3, 12 * 2.0 * d * n)
    steps = (solver.n_iter, solver.cg_steps, solver.final_cg_steps) if isinstance(solver, HTP) else (15, 1, 5)
    if choice.side == "output":
        return _in_metric(n, d, k, *steps)
    work = _pursuit(d, n, k, *steps)
    if n_inputs > 1:
        work += _Work(10.0 * n_inputs * (d * d * k + d * k * k)) * 15 + _pursuit(d, n, k, 15, 2, 10)
    return work


def _pursuit(d: int, n: int, k: int, n_iter: int, cg_steps: int, final_cg_steps: int) -> _Work:
    """``HTP`` with its start."""
    start = _singular_vectors(d, n) + _Work(2.0 * d * n * k, 2.0 * d * k * k, 1.2 * k * n) * START_ALTERNATIONS
    each = _dictionary(d, n, k) + _Work(
        d * k * (k + n) + (3.0 + cg_steps) * k * k * n, 0, (2.2 + 0.8 * cg_steps) * k * n
    )
    end = _Work(3.0 * d * k * n + (1.0 + final_cg_steps) * k * k * n, 0, 0.8 * final_cg_steps * k * n)
    return start + each * (n_iter + 1) + end


def _in_metric(d: int, n: int, k: int, n_iter: int, cg_steps: int, final_cg_steps: int) -> _Work:
    """``pursue_in_metric``: the dictionary in d dimensions, a metric on the n columns."""
    start = _Work(1.0 * d * n * n + d * d * n + d * k * n + k * n * n, 1.0 * d**3, 1.0 * k * n)
    each = _dictionary(d, n, k) + _Work(d * k * (k + n) + k * k * n, 0, 1.0 * k * n)
    step = _Work(k * n * n + k * k * n, 0, 0.8 * k * n)
    search = step * (2 + cg_steps) + _Work(0, 0, 1.0 * k * n)
    return start + each * (n_iter + 1) + search * n_iter + step * final_cg_steps


def _dictionary(d: int, n: int, k: int) -> _Work:
    """Least squares for a dictionary."""
    return _Work(1.0 * k * k * n + d * k * n, 0.5 * (k**3 / 3 + d * k * k))


def _singular_vectors(d: int, n: int) -> _Work:
    """Left singular vectors from the smaller Gram."""
    least = min(d, n)
    return _Work(2.0 * least * d * n, least**3 + (0.8 * d * n * n if d > n else 0.0))


def _rounding(choice: Factors, d: int, out_features: Sequence[int]) -> _Work:
    """``rounding.factors`` with its two alternations."""
    on_grids = grid_of(choice.value_dtype) or grid_of(choice.dictionary_dtype)
    if not on_grids or choice.side == "output" or choice.kind == "sparse":
        return _Work()
    n, k, s = sum(out_features), choice.n_atoms, choice.n_nonzero
    project = _Work(2.0 * d * d * k)
    judging = project + _Work(2.0 * d * k * n)
    dictionary = _Work(4.0 * d**3 + 7.0 * d * d * k, 0.1 * d**3, 0, 64.0 * d * k)
    refit = project + _Work(d * k * k + 4.0 * d * k * n + 12.0 * k * k * n, 0, 8.0 * k * n)
    coefficients = project + _Work(
        2.0 * d * k * k + 8.0 * d * k * n + 4.0 * k * k * n, 0, 4.0 * k * n, (2 * 64 + 48.0) * k * n
    )
    again = project * 1.5 + _Work(2.0 * k * k * n + 4.0 * d * k * n, 0.5 * (k**3 / 3 + d * k * k))
    spans = project + _Work(32.0 * d * d * s, 32 * 0.4 * d * s * s)
    return (dictionary + refit + coefficients + judging) * 3 + again * 2 + spans + refit + judging * 3


def _quantizing(d: int, n: int) -> _Work:
    """``quantize_dense`` with its three sweeps."""
    return _Work((0.5 + 3 * 1.5 + 3 * 2) * d * d * n, 0.1 * d**3, 3.0 * d * n, (3 * 64 + 64.0) * d * n)
