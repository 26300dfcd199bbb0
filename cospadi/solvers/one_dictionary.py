"""One dictionary for layers with inputs of their own, each layer measured by its own Gram.

Layers l = 1..m of equal input width share D and have coefficients S_l of their own; what is minimised is the error of
all their outputs,

    sum_l w_l || L_l^T (W_l - D S_l) diag(f_l)^1/2 ||_F^2,    G_l = L_l L_l^T the Gram of the layer's inputs.

Averaging the Grams instead (arXiv 2509.22075, A.4, and 2410.03765) turns this into an ordinary problem, whose solution
is the start here.  GeoPair solves pairs in their exact metrics; this solves any number.  See ``shared_problem`` for the
coordinates and ``sylvester`` for the dictionary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, final

from cospadi.arrays import Array, convert, library_of, namespace
from cospadi.errors import NumericalError, UsageError
from cospadi.solvers.base import Solver, Status
from cospadi.solvers.conjugate_gradients import conjugate_gradients
from cospadi.solvers.htp import HTP
from cospadi.solvers.shared_problem import RelativeLayer, SharedProblem, relative_layers
from cospadi.solvers.sylvester import Fit, closed_form_dictionary, iterative_dictionary
from cospadi.solvers.updates import hard_threshold, squared_columns, unit_columns
from cospadi.whitening import Problem


@dataclass(frozen=True)
class SharedSolution:
    """A dictionary, the coefficients of each layer, and how they were reached.

    Attributes
    ----------
    dictionary : array, shape (in_features, n_atoms)
        D, in the space of the layers' inputs (not whitened), float64.
    coefficients : tuple of array, shape (n_atoms, out_features of the entry)
        S_l, zero outside the support; float64 if the weights are, else float32.
    relative_errors : tuple of float
        ``||L_l^T (W_l - D S_l)|| / ||L_l^T W_l||`` with the columns weighted, of each entry.
    objective : float
        What is minimised.
    start_objective : float
        The same after the start, the solution in the averaged metric.
    status : Status
        Why it stopped.
    statistics : dict
        ``iterations``, ``dictionary_steps`` (conjugate gradient steps in all dictionaries) and
        ``dictionary_residual`` (the largest that was left).
    """

    dictionary: Array
    coefficients: tuple[Array, ...]
    relative_errors: tuple[float, ...]
    objective: float
    start_objective: float
    status: Status = Status.MAX_ITERATIONS
    statistics: dict[str, float | int | str] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class SharedHTP:
    """Hard thresholding pursuit for a dictionary that layers share, each layer in its own metric.

    Starts from the solution in the averaged metric, and then repeats: the dictionary that is best for all layers (see
    ``sylvester``), atoms of unit norm in the mean metric; and for each layer an iteration of ``HTP`` in its own
    whitened space, in which the atoms are scaled to unit norm again, so that a threshold compares like with like.  The
    best iterate is kept and ends with more conjugate gradient steps on its support: the result is never worse than the
    start.

    Attributes
    ----------
    start : Solver
        Solves the problem in the averaged metric.
    n_iter : int
        Iterations in the exact metrics; 0 keeps the start, as it is.
    cg_steps, final_cg_steps : int
        Conjugate gradient steps on the coefficients in each iteration and at the end.
    dictionary : {"iterative", "closed-form"}
        How the best dictionary is found; the closed form is for two layers.
    dictionary_tolerance : float
        Relative residual at which the iterative dictionary stops.
    dictionary_steps : int
        Its largest number of steps; an iteration starts where the last one ended, so that few will do.
    """

    start: Solver = field(default_factory=HTP)
    n_iter: int = 15
    cg_steps: int = 2
    final_cg_steps: int = 10
    dictionary: Literal["iterative", "closed-form"] = "iterative"
    dictionary_tolerance: float = 1e-3
    dictionary_steps: int = 10

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("n_iter", "cg_steps", "final_cg_steps", "dictionary_steps")}
        if min(counts.values()) < 0 or not self.dictionary_tolerance >= 0:
            given = ", ".join(f"{name}={value}" for name, value in counts.items())
            raise UsageError(f"{given}, dictionary_tolerance={self.dictionary_tolerance}: expected 0 or more")
        if self.dictionary not in ("iterative", "closed-form"):
            raise UsageError(f"dictionary={self.dictionary!r}: expected 'iterative' or 'closed-form'")

    def solve(self, problem: SharedProblem) -> SharedSolution:
        """Solve one problem.

        Parameters
        ----------
        problem : SharedProblem
            Numpy arrays, or tensors; tensors on the CPU are solved as numpy arrays.

        Returns
        -------
        SharedSolution
            Arrays of the library and device of the weights.

        Raises
        ------
        NumericalError
            The weights, the factors or the result hold NaN or infinity, or a factor is singular.
        UsageError
            The start cannot handle these sizes, or the closed form is asked of a number of layers other than two.
        """
        if self.dictionary == "closed-form" and len(problem.weights) != 2:
            raise UsageError(
                f"the closed form is for two layers, these are {len(problem.weights)}: choose dictionary='iterative'"
            )
        layers, upper = relative_layers(problem)
        A, codes = self._start(layers, problem)
        first, best = (A, codes), (A, codes)
        start_objective = objective = _objective(layers, A, codes)
        lowest = float("inf")
        steps, residual = 0, 0.0
        for iteration in range(self.n_iter + 1 if self.n_iter else 0):
            fit = self._fit(layers, A, codes)
            steps, residual = steps + fit.steps, max(residual, fit.residual)
            A, sizes = unit_columns(fit.dictionary)
            codes = [S * sizes[:, None] for S in codes]
            views = [_View.of(layer, A, S) for layer, S in zip(layers, codes, strict=True)]
            error = sum(view.error for view in views)
            if error < lowest:
                best, lowest = (A, codes), error
            if iteration == self.n_iter:
                break
            codes = [view.pursue(problem.n_nonzero, self.cg_steps) for view in views]
        if self.n_iter:
            A, codes = best
            codes = [_View.of(la, A, S).refine(self.final_cg_steps) for la, S in zip(layers, codes, strict=True)]
            # By explicit residuals: the sums above lose digits when the errors are small.
            objective = _objective(layers, A, codes)
            if not objective < start_objective:
                (A, codes), objective = first, start_objective
        statistics: dict[str, float | int | str] = {
            "iterations": self.n_iter,
            "dictionary_steps": steps,
            "dictionary_residual": residual,
        }
        return _solution(problem.weights[0], layers, upper, A, codes, start_objective, statistics)

    def _start(self, layers: Sequence[RelativeLayer], problem: SharedProblem) -> tuple[Array, list[Array]]:
        """Give the dictionary and the coefficients that the averaged metric finds best."""
        together = namespace(layers[0].averaged).concat([layer.averaged for layer in layers], axis=1)
        solution = self.start.solve(Problem(together, problem.n_atoms, problem.n_nonzero, seed=problem.seed))
        codes, begin = [], 0
        for layer in layers:
            end = begin + layer.averaged.shape[1]
            codes.append(solution.coefficients[:, begin:end] / layer.share**0.5)
            begin = end
        return solution.dictionary, codes

    def _fit(self, layers: Sequence[RelativeLayer], A: Array, codes: Sequence[Array]) -> Fit:
        metrics, products = [layer.metric for layer in layers], [layer.product for layer in layers]
        if self.dictionary == "closed-form":
            return closed_form_dictionary(metrics, products, codes, A)
        return iterative_dictionary(metrics, products, codes, A, self.dictionary_tolerance, self.dictionary_steps)


@dataclass(frozen=True)
class _View:
    """One layer's sparse problem in its own whitened space, the atoms scaled to unit norm there."""

    norms: Array
    gram: Array
    gradient: Array
    codes: Array
    error: float

    @classmethod
    def of(cls, layer: RelativeLayer, A: Array, S: Array) -> "_View":
        """Look at a layer's target, its coefficients and the atoms as its metric sees them."""
        xp = namespace(A)
        Y = layer.target
        atoms, norms = unit_columns(layer.root @ A)
        S = S * norms[:, None]
        G, B = atoms.T @ atoms, atoms.T @ Y
        C = B - G @ S
        error = float(xp.sum(Y * Y)) - float(xp.sum(S * B)) - float(xp.sum(S * C))
        return cls(norms, G, C, S, error)

    def pursue(self, n_nonzero: int, steps: int) -> Array:
        """Give the coefficients after a gradient step, a threshold and conjugate gradients on the support."""
        xp = namespace(self.codes)
        C = self.gradient
        # A curvature of a few roundings is that of a null direction: a step along it is noise.
        energy = squared_columns(C)
        curvature = xp.sum(C * (self.gram @ C), axis=0)
        curved = curvature > 64 * float(xp.finfo(C.dtype).eps) * energy
        length = xp.where(curved, energy / xp.where(curved, curvature, xp.ones_like(energy)), xp.zeros_like(energy))
        S = hard_threshold(self.codes + length[None, :] * C, n_nonzero)
        # The gradient at the new coefficients, without A^T Y at hand: B - G S = C + G (S_old - S).
        return self._own(conjugate_gradients(self.gram, C + self.gram @ (self.codes - S), S, steps))

    def refine(self, steps: int) -> Array:
        """Give the coefficients after conjugate gradients on the support they have."""
        return self._own(conjugate_gradients(self.gram, self.gradient, self.codes, steps))

    def _own(self, S: Array) -> Array:
        """Take the scale of the atoms out again; atoms that the layer's metric does not see get no coefficients."""
        xp = namespace(S)
        seen = self.norms > 0
        inverse = xp.where(seen, 1 / xp.where(seen, self.norms, xp.ones_like(self.norms)), xp.zeros_like(self.norms))
        return S * inverse[:, None]


def _objective(layers: Sequence[RelativeLayer], A: Array, codes: Sequence[Array]) -> float:
    return sum(layer.squared_error(A, S) for layer, S in zip(layers, codes, strict=True))


def _solution(
    like: Array,
    layers: Sequence[RelativeLayer],
    upper: Array,
    A: Array,
    codes: Sequence[Array],
    start_objective: float,
    statistics: dict[str, float | int | str],
) -> SharedSolution:
    """Take the result back to the space of the inputs, and to the library of an array."""
    xp = namespace(A)
    errors = [layer.squared_error(A, S) for layer, S in zip(layers, codes, strict=True)]
    totals = [layer.squared_target for layer in layers]
    dictionary = xp.linalg.solve(upper, xp.astype(A, xp.float64))
    coefficients = [S / layer.column_scales[None, :] for layer, S in zip(layers, codes, strict=True)]
    if not all(bool(xp.all(xp.isfinite(array))) for array in (dictionary, *coefficients)):
        raise NumericalError("SharedHTP produced NaN or infinity")
    return SharedSolution(
        _give_back(dictionary, like),
        tuple(_give_back(S, like) for S in coefficients),
        tuple((error / total) ** 0.5 if total > 0 else 0.0 for error, total in zip(errors, totals, strict=True)),
        sum(errors),
        start_objective,
        Status.MAX_ITERATIONS,
        statistics,
    )


def _give_back(array: Array, like: Array) -> Array:
    """Convert to the library and device of another array, keeping the dtype."""
    converted = convert(array, library_of(like))
    return converted.to(like.device) if library_of(like) == "torch" else converted
