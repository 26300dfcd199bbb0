"""What each way of storing a group would cost, estimated cheaply.

A profile holds, for a coarse grid of sizes, the predicted loss increase (see ``objective.py``) of factors found without
iterations, and that of rounding the weights themselves.  It does not depend on the ratio asked for, so one profile
serves any number of budgets.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from cospadi.arrays import convert
from cospadi.errors import CheckpointError
from cospadi.formats import dequantize, grid_of, quantize
from cospadi.solvers import (
    hard_threshold,
    leading_left_singular_vectors,
    least_squares_dictionary,
    pursue_in_metric,
    sparsify,
)
from cospadi.whitening import Objective

Side = Literal["input", "output"]
SPARSE = "sparse"
"""Stands in place of a side for weights that are sparse themselves, with no dictionary."""

_SHARES = (1.0, 0.75, 0.5, 0.3, 0.15)
"""Atoms of the profile's points, as parts of a complete dictionary."""
_OUTPUT_SHARES = (1.0, 0.6, 0.3)
"""The same with the dictionary on the side of the outputs, where a point takes longer: for one rho alone."""
_DENSITIES = (0.95, 0.8, 0.6, 0.4, 0.2, 0.08)
"""Non-zeros of sparse weights, as parts of all."""
_DENSER = (0.5, 0.75, 0.92)
"""Non-zeros per atom of further points with a complete dictionary."""


@dataclass(frozen=True)
class Families:
    """What the menus offer beside the dense layers.

    Attributes
    ----------
    rhos : tuple of float
        Atoms per non-zero of a column.
    sides : tuple of str
        Sides that the dictionary may be on; ``output`` for groups of one layer only, and beside ``input`` only for
        layers with more inputs than outputs: elsewhere the dictionary would grow.
    dtypes : tuple of (str, str)
        Value dtype and dictionary dtype of factors; none offers no factors.
    quantized : tuple of str
        Dtypes for the weights themselves.
    sparse : bool
        False for solvers whose coefficients are dense.
    learned, identity : bool
        Whether to offer learned dictionaries, and the identity in place of one.
    """

    rhos: tuple[float, ...] = (2.0, 3.0)
    sides: tuple[Side, ...] = ("input", "output")
    dtypes: tuple[tuple[str, str], ...] = (("bfloat16", "bfloat16"), ("int8", "int8"))
    quantized: tuple[str, ...] = ()
    sparse: bool = True
    learned: bool = True
    identity: bool = True

    def curves(self, in_features: int, out_features: Sequence[int]) -> dict[str, str]:
        """Give the side of each set of points that menus for a group of these widths need, by its name."""
        if not self.dtypes:
            return {}
        found = {SPARSE: SPARSE} if self.identity else {}
        if self.learned and "input" in self.sides:
            found["input " + (",".join(f"{rho:g}" for rho in self.rhos) if self.sparse else "dense")] = "input"
        able = self.learned and self.sparse and "output" in self.sides and len(out_features) == 1
        if able and (in_features > out_features[0] or "input" not in self.sides):
            found[f"output {self.middle_rho:g}"] = "output"
        return found

    @property
    def middle_rho(self) -> float:
        """The rho at which a group is sampled where every sample costs a solve."""
        return self.rhos[len(self.rhos) // 2]

    def for_outputs(self) -> "Families":
        """Give what is offered with the dictionary on the side of the outputs."""
        return replace(self, rhos=(self.middle_rho,))


@dataclass(frozen=True)
class Point:
    """The predicted loss increase of factors of one size."""

    n_atoms: int
    n_nonzero: int
    loss_increase: float


@dataclass(frozen=True)
class GroupProfile:
    """What is known of one group.

    Attributes
    ----------
    name, kind : str
        Of the group, and of its layers within a block.
    in_features : int
    out_features : tuple of int
        Of each member.
    energy : float
        Loss increase of outputs of zero.
    points : dict of str to tuple of Point
        By the names of ``Families.curves``.
    quantized : dict of str to tuple of float
        By dtype, the loss increase of each member.
    spectrum : tuple of float
        Singular values of the whitened target.
    """

    name: str
    kind: str
    in_features: int
    out_features: tuple[int, ...]
    energy: float
    points: dict[str, tuple[Point, ...]] = field(default_factory=dict)
    quantized: dict[str, tuple[float, ...]] = field(default_factory=dict)
    spectrum: tuple[float, ...] = ()

    @property
    def group_kind(self) -> str:
        """What groups have in common that one correction serves: the kind and the number of members."""
        return f"{self.kind}x{len(self.out_features)}"

    @property
    def dense_bits(self) -> int:
        """Bits of the members' dense weights in bfloat16."""
        return 16 * self.in_features * sum(self.out_features)

    def to_json(self) -> str:
        """Give a text that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "GroupProfile":
        """Read what ``to_json`` gave.

        Raises
        ------
        CheckpointError
            It is something else.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data["points"] = {side: tuple(Point(**p) for p in points) for side, points in data["points"].items()}
            data["quantized"] = {dtype: tuple(increases) for dtype, increases in data["quantized"].items()}
            data["out_features"], data["spectrum"] = tuple(data["out_features"]), tuple(data["spectrum"])
            return cls(**data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not a saved profile ({error})") from error


def profile_group(
    objective: Objective, kind: str, families: Families, spectrum: bool = False, known: GroupProfile | None = None
) -> GroupProfile:
    """Estimate what the ways of storing one group would cost.

    Factors by one hard threshold of the singular directions and a least-squares dictionary (with the dictionary on the
    side of the outputs with a few conjugate gradient steps); sparse weights by one threshold and a few
    conjugate gradient steps; weights by rounding to nearest, whose errors are taken to be uncorrelated.  What an
    earlier profile of the group knows is taken over.
    """
    if known is None:
        energy = objective.loss_increase(torch.zeros_like(objective.weight))
        known = GroupProfile(objective.name, kind, objective.weight.shape[0], objective.widths, energy)
    points, quantized = dict(known.points), dict(known.quantized)
    make = {SPARSE: _sparse_points, "input": _input_points, "output": _output_points}
    for name, side in families.curves(objective.weight.shape[0], objective.widths).items():
        if name not in points:
            points[name] = make[side](objective, families)
    for dtype in families.quantized:
        if dtype not in quantized:
            quantized[dtype] = _rounding_increases(objective, dtype)
    values = _spectrum(objective) if spectrum and not known.spectrum else known.spectrum
    return replace(known, points=points, quantized=quantized, spectrum=values)


def is_complete(profile: GroupProfile, families: Families, spectrum: bool) -> bool:
    """Tell whether a profile has all that menus of these families need."""
    wanted = families.curves(profile.in_features, profile.out_features)
    return (
        set(wanted) <= set(profile.points)
        and set(families.quantized) <= set(profile.quantized)
        and (bool(profile.spectrum) or not spectrum)
    )


def sizes(d: int, n: int, families: Families, shares: Sequence[float] = _SHARES) -> list[tuple[int, int]]:
    """Give the atoms and non-zeros of the profile's points for a dictionary in d dimensions and n columns."""
    most = min(d, n)
    atoms = [max(1, round(share * most)) for share in shares]
    if not families.sparse:
        return sorted({(k, k) for k in atoms})
    found = {(k, max(1, int(k / rho))) for k in atoms for rho in families.rhos}
    found |= {(most, round(part * most)) for part in _DENSER if round(part * most) > most / min(families.rhos)}
    return sorted(found)


def along_atoms(points: Sequence[Point], rho: float, families: Families) -> list[Point]:
    """Give the points of one rho, by their atoms."""
    wanted = [p for p in points if not families.sparse or p.n_nonzero == max(1, int(p.n_atoms / rho))]
    return sorted(wanted, key=lambda p: p.n_atoms)


def _sparse_points(objective: Objective, families: Families) -> tuple[Point, ...]:
    W, G = (convert(matrix.to(torch.float32), "numpy") for matrix in (objective.weight, objective.metric))
    scales = convert(objective.scales.to(torch.float32), "numpy")
    objective.release()
    d, n = W.shape
    found = []
    for s in sorted({max(1, round(density * d)) for density in _DENSITIES}):
        E = (W - sparsify(W, G, s * n, scales, n_iter=0, final_cg_steps=3)) * scales
        found.append(Point(d, s, _half_per_token(np.sum(E * (G @ E), dtype=np.float64), objective)))
    return tuple(found)


def _input_points(objective: Objective, families: Families) -> tuple[Point, ...]:
    Y = convert((objective.target * objective.scales.to(torch.float32)), "numpy")
    objective.release()
    U = leading_left_singular_vectors(Y, min(Y.shape))
    C = U.T @ Y
    found = []
    d, n = Y.shape
    for k, s in sizes(d, n, families):
        S = hard_threshold(C[:k], s) if families.sparse else C[:k]
        A = least_squares_dictionary(Y, S, U[:, :k]) if families.sparse else U[:, :k]
        found.append(Point(k, s, _half_per_token(np.sum((Y - A @ S) ** 2, dtype=np.float64), objective)))
    return tuple(found)


def _output_points(objective: Objective, families: Families) -> tuple[Point, ...]:
    problem = objective.transposed_problem(1, 1)
    T, M = convert(problem.target, "numpy"), convert(problem.column_metric, "numpy")
    del problem
    objective.release()
    roots = np.sqrt(np.diagonal(M))
    T, M = T * roots, M / (roots[:, None] * roots)
    found = []
    d, n = T.shape
    for k, s in sizes(d, n, families.for_outputs(), _OUTPUT_SHARES):
        A, S = pursue_in_metric(T, M, k, s, n_iter=0, cg_steps=0, final_cg_steps=3)
        E = T - A @ S
        found.append(Point(k, s, _half_per_token(np.sum((E @ M) * E, dtype=np.float64), objective)))
    return tuple(found)


def _rounding_increases(objective: Objective, dtype: str) -> tuple[float, ...]:
    grid = grid_of(dtype)
    assert grid is not None
    increases = []
    parts = objective.weight.split(objective.widths, dim=1)
    scales = objective.scales.split(objective.widths)
    for part, scale, gram in zip(parts, scales, objective.grams, strict=True):
        rows = part.T.to(torch.float32).contiguous()
        error = rows - dequantize(*quantize(rows, grid), grid)
        diagonal = gram.diagonal() if bool(gram.any()) else torch.ones_like(gram.diagonal())
        per_output = error.square().to(torch.float64) @ diagonal
        increases.append(_half_per_token(float(per_output @ scale.square()), objective))
    return tuple(increases)


def _spectrum(objective: Objective) -> tuple[float, ...]:
    values = np.linalg.svd(convert(objective.target, "numpy"), compute_uv=False)
    return tuple(float(v) for v in values)


def _half_per_token(squared: float, objective: Objective) -> float:
    # In a metric, rounding may leave a sum of squares slightly below zero.
    return max(0.5 * float(squared) / max(1, objective.n_tokens), 0.0)
