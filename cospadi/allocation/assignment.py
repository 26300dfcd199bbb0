"""The plan: how each group of layers is stored, from the recipe and the measured profiles."""

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from cospadi.allocation.base import Allocation, Allocator, capacity_for
from cospadi.allocation.budget import Budget, GroupShape
from cospadi.allocation.choices import DENSE, Choice, Factors, Method, Quantized
from cospadi.allocation.equal_ratio import EqualRatio
from cospadi.allocation.knapsack import Knapsack
from cospadi.allocation.menu import Entry, Menu, restrict
from cospadi.allocation.offers import Corrections, interpolation_errors, menu
from cospadi.allocation.pooled import PooledSpectrum
from cospadi.allocation.profile import Families, GroupProfile
from cospadi.allocation.uniform import Uniform
from cospadi.errors import UsageError
from cospadi.formats import FORMATS, dictionary_dtype_of
from cospadi.models import Group
from cospadi.recipe import CompressionConfig, read_limit

STRATEGIES: dict[str, Callable[[], Allocator]] = {
    "knapsack": Knapsack,
    "pooled-spectrum": PooledSpectrum,
    "equal-ratio": EqualRatio,
}


@dataclass(frozen=True)
class GroupPlan:
    """A group of layers and how to store it.

    Attributes
    ----------
    group : Group
    choice : Factors or Quantized
        Not dense.
    predicted : float or None
        The loss increase that the allocation counted on; None for formulas without one, and where the solver weighs
        errors otherwise.
    """

    group: Group
    choice: Choice
    predicted: float | None


class AllocationAccount(TypedDict, total=False):
    """How the bytes were spread, for the report; the uniform strategy has its name alone.

    ``predicted_cost`` is the sum over the groups in the measure ``cost``; ``gap`` the largest fraction of it that a
    better choice could save, None where nothing is proved; ``unused`` the fraction of the allowed bytes that is left;
    ``profile_interpolation_error`` the median relative error of the profiles between their points.
    """

    strategy: str
    cost: str
    predicted_cost: float
    gap: float | None
    unused: float
    note: str
    profile_interpolation_error: float | None


@dataclass(frozen=True)
class Assignment:
    """How every group is stored.

    Attributes
    ----------
    groups : tuple of GroupPlan
        The groups that change; groups that are quantised come layer by layer.
    dense : tuple of Group
        The layers that stay as they are, each alone.
    account : AllocationAccount
        For the report.
    """

    groups: tuple[GroupPlan, ...]
    dense: tuple[Group, ...]
    account: AllocationAccount


def uniform_assignment(config: CompressionConfig, method: Method, groups: Sequence[Group]) -> Assignment:
    """Give every group the same ratio by formula.

    Raises
    ------
    UsageError
        No layer is large enough to save anything.
    """
    value_dtype = "bfloat16" if config.value_dtype == "auto" else config.value_dtype
    codec = FORMATS.create(method.format)
    rho = config.rho or 2.0
    budget = Budget(config.ratio, rho, codec, value_dtype, config.convention, method.solver.sparse)
    sizes = Uniform(budget).allocate([GroupShape(g.in_features, g.out_features) for g in groups])
    plans, dense = [], []
    for group, size in zip(groups, sizes, strict=True):
        if size is None:
            dense += [Group((layer,)) for layer in group.layers]
        else:
            dtypes = (value_dtype, dictionary_dtype_of(value_dtype))
            plans.append(GroupPlan(group, Factors(size.n_atoms, size.n_nonzero, "input", *dtypes), None))
    if not plans:
        raise UsageError(f"at ratio {config.ratio} no layer is large enough to save anything: choose another ratio")
    return Assignment(tuple(plans), tuple(dense), {"strategy": "uniform"})


def check_plan(config: CompressionConfig, method: Method, groups: Sequence[Group]) -> None:
    """Refuse what cannot work, before the long calibration.

    Raises
    ------
    UsageError
        The solver cannot do what the recipe asks for, a limit matches no layer, or nothing would change.
    """
    if config.allocation == "uniform":
        uniform_assignment(config, method, groups)
        return
    families_of(config, method)
    names = [layer.name for group in groups for layer in group.layers]
    for text in config.limits:
        if not fnmatch.filter(names, read_limit(text)[0]):
            raise UsageError(f"limit {text!r} matches no layer; they are named like {names[0]!r}")


def families_of(config: CompressionConfig, method: Method) -> Families:
    """Give what the recipe lets the menus offer.

    Raises
    ------
    UsageError
        The recipe asks for what the solver cannot do.
    """
    able = type(method.solver).takes_column_metric
    if config.side == "output" and not able:
        raise UsageError(f"side 'output' needs a solver with a metric on both sides: htp, not {method.solver_name!r}")
    sides = ("input", "output") if able else ("input",)
    chosen = ("bfloat16", "int8") if config.value_dtype == "auto" else (config.value_dtype,)
    return Families(
        rhos=(2.0, 3.0) if config.rho is None else (config.rho,),
        sides=sides if config.side == "auto" else (config.side,),  # type: ignore[arg-type]
        dtypes=() if config.storage == "quantized" else tuple((dtype, dictionary_dtype_of(dtype)) for dtype in chosen),
        quantized=() if config.storage == "factors" else config.weight_dtypes,
        sparse=method.solver.sparse,
        learned=config.dictionary != "identity",
        identity=config.dictionary != "learned" and method.solver.sparse,
    )


def allocate(
    config: CompressionConfig,
    method: Method,
    families: Families,
    groups: Sequence[Group],
    profiles: Sequence[GroupProfile],
    corrections: Corrections,
) -> Assignment:
    """Choose how each group is stored, within the bytes that the recipe allows.

    Raises
    ------
    UsageError
        The bytes or the limits cannot be met.
    """
    menus = [
        _costed(_limited(menu(p, families, method.format, corrections, config.convention), g, config.limits), p, config)
        for p, g in zip(profiles, groups, strict=True)
    ]
    found: Allocation = STRATEGIES[config.allocation]().allocate(menus, capacity_for(menus, config.ratio))
    plans: list[GroupPlan] = []
    dense: list[Group] = []
    # The solver may weigh errors otherwise than the allocation does: then their increases do not compare.
    comparable = config.column_weights == (config.cost == "sensitivity")
    for group, profile, entry in zip(groups, profiles, found.entries, strict=True):
        choice: Choice = entry.choice
        if isinstance(choice, Factors):
            plans.append(GroupPlan(group, choice, entry.cost * _per_cost(profile, config) if comparable else None))
            continue
        for layer, dtype in zip(group.layers, choice.dtypes, strict=True):
            alone = Group((layer,))
            if dtype == DENSE:
                dense.append(alone)
            else:
                plans.append(GroupPlan(alone, Quantized((dtype,)), None))
    if not plans:
        raise UsageError(f"at ratio {config.ratio} nothing would change: choose a larger ratio")
    return Assignment(tuple(plans), tuple(dense), _account(config, found, profiles, families))


def _costed(menu: Menu, profile: GroupProfile, config: CompressionConfig) -> Menu:
    per_cost = _per_cost(profile, config)
    entries = tuple(Entry(e.bits, e.cost / per_cost, e.choice) for e in menu.entries)
    return replace(menu, entries=entries)


def _per_cost(profile: GroupProfile, config: CompressionConfig) -> float:
    """Give the predicted loss increase for a cost of one in the recipe's measure."""
    return max(profile.energy, 1e-300) if config.cost == "relative-error" else 1.0


def _limited(menu: Menu, group: Group, limits: Sequence[str]) -> Menu:
    low, high = 0.0, 1.0
    for text in limits:
        pattern, least, most = read_limit(text)
        if any(fnmatch.fnmatchcase(layer.name, pattern) for layer in group.layers):
            low, high = least, most
    return menu if (low, high) == (0.0, 1.0) else restrict(menu, low, high)


def _account(
    config: CompressionConfig, found: Allocation, profiles: Sequence[GroupProfile], families: Families
) -> AllocationAccount:
    errors = [interpolation_errors(profile, families) for profile in profiles]
    spread = np.abs(np.concatenate(errors)) if errors else np.zeros(0)
    finite = spread[np.isfinite(spread)]
    return {
        "strategy": config.allocation,
        "cost": config.cost,
        "predicted_cost": found.cost,
        "gap": found.gap,
        "unused": found.unused,
        "note": found.note,
        "profile_interpolation_error": float(np.median(finite)) if finite.size else None,
    }
