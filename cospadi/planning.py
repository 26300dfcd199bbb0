"""From the recipe and what was measured to a plan: how each group of layers is stored."""

import fnmatch
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from cospadi import costs
from cospadi.allocation.base import Allocation, Allocator, capacity_for
from cospadi.allocation.budget import Budget, GroupShape
from cospadi.allocation.equal_ratio import EqualRatio
from cospadi.allocation.knapsack import Knapsack
from cospadi.allocation.menu import Entry, Menu, restrict
from cospadi.allocation.pooled import PooledSpectrum
from cospadi.allocation.uniform import Uniform
from cospadi.choices import DENSE, Choice, Factors, Quantized
from cospadi.config import CompressionConfig, read_limit
from cospadi.errors import CheckpointError, UsageError
from cospadi.events import Corrected, Profiled
from cospadi.executors import Task
from cospadi.factorize import Approximation, Method, approximate, rounded
from cospadi.formats.base import FORMATS
from cospadi.formats.dictionary import dictionary_dtype_of
from cospadi.formats.packing import pack_group, unpack_group
from cospadi.formats.quantization import GRIDS, dequantize
from cospadi.groups import Group
from cospadi.inputs import GroupInputs
from cospadi.job import Job, cost_is_sensitivity
from cospadi.menus import Corrections, interpolation_errors, menu
from cospadi.objective import Objective
from cospadi.profile import SPARSE, Families, GroupProfile, Point, is_complete, profile_group
from cospadi.rounding.dense import quantize_dense
from cospadi.solvers.htp import HTP

STRATEGIES: dict[str, Callable[[], Allocator]] = {
    "knapsack": Knapsack,
    "pooled-spectrum": PooledSpectrum,
    "equal-ratio": EqualRatio,
}


@dataclass(frozen=True)
class Unit:
    """One piece of work: a group of layers and how to store it.

    Attributes
    ----------
    group : Group
    choice : Factors or Quantized
        Not dense.
    predicted : float or None
        The harm that the allocation reckoned with; None for formulas that reckon with none, and where the solver weighs
        errors otherwise.
    """

    group: Group
    choice: Choice
    predicted: float | None


@dataclass(frozen=True)
class Assignment:
    """How every group is stored.

    Attributes
    ----------
    units : tuple of Unit
        The groups that change; groups that are quantised come layer by layer.
    dense : tuple of Group
        The layers that stay as they are, each alone.
    account : dict
        For the report: strategy, predicted cost, proved gap, unused bytes, errors of the profile.
    """

    units: tuple[Unit, ...]
    dense: tuple[Group, ...]
    account: dict[str, Any]


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
    units, dense = [], []
    for group, size in zip(groups, sizes, strict=True):
        if size is None:
            dense += [Group((layer,)) for layer in group.layers]
        else:
            dtypes = (value_dtype, dictionary_dtype_of(value_dtype))
            units.append(Unit(group, Factors(size.n_atoms, size.n_nonzero, "input", *dtypes), None))
    if not units:
        raise UsageError(f"at ratio {config.ratio} no layer is large enough to save anything: choose another ratio")
    return Assignment(tuple(units), tuple(dense), {"strategy": "uniform"})


def check_plan(config: CompressionConfig, method: Method, groups: Sequence[Group]) -> None:
    """Say what cannot work before the long calibration.

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


def profile_groups(job: Job, families: Families) -> list[GroupProfile]:
    """Profile all groups, as far as earlier runs with the same weighting have not."""
    config, facts = job.config, _weighting(job.config)
    spectrum = config.allocation == "pooled-spectrum"
    profiles: dict[int, GroupProfile] = {}
    known: dict[int, GroupProfile | None] = {}
    work = [costs.profiling(group.in_features, group.out_features, families, spectrum) for group in job.groups]
    for index, group in enumerate(job.groups):
        found = known[index] = _kept(job, _name(group), facts, GroupProfile.from_json)
        if found is not None and is_complete(found, families, spectrum):
            profiles[index] = found
            job.tell(
                Profiled(len(profiles), len(job.groups), True, work_done=_at(work, profiles), work_total=sum(work))
            )
    pending = [index for index in range(len(job.groups)) if index not in profiles]
    if pending:
        job.tell(Profiled(len(profiles), len(job.groups), work_done=_at(work, profiles), work_total=sum(work)))
    tasks = [
        Task(
            job.groups[index].name,
            work[index],
            partial(_profile, config, cost_is_sensitivity(config), job.groups[index], families, spectrum, known[index]),
            job.reader(job.groups[index]),
        )
        for index in pending
    ]
    for number, profile in job.executor.run(tasks):
        index = pending[number]
        job.measurements.keep_text(_name(job.groups[index]), facts, profile.to_json())
        profiles[index] = profile
        job.tell(Profiled(len(profiles), len(job.groups), work_done=_at(work, profiles), work_total=sum(work)))
    return [profiles[index] for index in range(len(job.groups))]


def measure_corrections(job: Job, families: Families, profiles: Sequence[GroupProfile]) -> Corrections:
    """Solve the middle group of each sort at one size, and compare with what the profile says of it."""
    config, method = job.config, job.method
    facts, middle = _correction_facts(job, families), _middle_of_sorts(profiles)
    work = [
        costs.correcting(job.groups[index].in_features, job.groups[index].out_features, families, method.solver)
        for index in middle.values()
    ]
    found: dict[int, Corrections] = {}
    tasks, pending = [], []
    for number, (sort, index) in enumerate(middle.items()):
        kept = _kept(job, f"corrections-{sort}", facts, Corrections.from_json)
        if kept is not None:
            found[number] = kept
            job.tell(Corrected(len(found), len(middle), True, work_done=_at(work, found), work_total=sum(work)))
            continue
        run = partial(
            _corrections, config, cost_is_sensitivity(config), job.groups[index], profiles[index], families, method
        )
        tasks.append(Task(job.groups[index].name, work[number], run, job.reader(job.groups[index])))
        pending.append((number, sort))
    if pending:
        job.tell(Corrected(len(found), len(middle), work_done=_at(work, found), work_total=sum(work)))
    for done, corrections in job.executor.run(tasks):
        number, sort = pending[done]
        job.measurements.keep_text(f"corrections-{sort}", facts, corrections.to_json())
        found[number] = corrections
        job.tell(Corrected(len(found), len(middle), work_done=_at(work, found), work_total=sum(work)))
    joined = Corrections()
    for number in range(len(middle)):
        for own, more in zip(vars(joined).values(), vars(found[number]).values(), strict=True):
            own.update(more)
    return joined


def _profile(
    config: CompressionConfig,
    weighted: bool,
    group: Group,
    families: Families,
    spectrum: bool,
    known: GroupProfile | None,
    device: str,
    inputs: GroupInputs,
) -> GroupProfile:
    target = inputs.to(device).objective(config, group, weighted)
    return profile_group(target, group.layers[0].kind, families, spectrum, known)


def _corrections(
    config: CompressionConfig,
    weighted: bool,
    group: Group,
    profile: GroupProfile,
    families: Families,
    method: Method,
    device: str,
    inputs: GroupInputs,
) -> Corrections:
    found = Corrections()
    _correct(found, profile, group, inputs.to(device).objective(config, group, weighted), families, method)
    return found


T = TypeVar("T")


def _kept(job: Job, name: str, facts: dict[str, Any], read: Callable[[str], T]) -> T | None:
    """Give what an earlier run kept under a name; what another version wrote counts as missing."""
    text = job.measurements.text(name, facts)
    try:
        return None if text is None else read(text)
    except CheckpointError:
        return None


def profile_paths(job: Job) -> list[str]:
    """Give where the profile of each group is kept once it is known."""
    facts = _weighting(job.config)
    return [str(job.measurements.text_path(_name(group), facts).absolute()) for group in job.groups]


def correction_paths(job: Job, families: Families, profiles: Sequence[GroupProfile]) -> list[str]:
    """Give where the corrections of each sort are kept once they are known."""
    facts = _correction_facts(job, families)
    sorts = _middle_of_sorts(profiles)
    return [str(job.measurements.text_path(f"corrections-{sort}", facts).absolute()) for sort in sorts]


def _correction_facts(job: Job, families: Families) -> dict[str, Any]:
    return {"families": asdict(families), "solver": repr(job.method), **_weighting(job.config)}


def _middle_of_sorts(profiles: Sequence[GroupProfile]) -> dict[str, int]:
    """Give the index of the middle group of each sort."""
    by_sort: dict[str, list[int]] = {}
    for index, profile in enumerate(profiles):
        by_sort.setdefault(profile.sort, []).append(index)
    return {sort: indices[len(indices) // 2] for sort, indices in by_sort.items()}


def _name(group: Group) -> str:
    return f"{group.name}-{len(group.layers)}"


def _at(work: Sequence[float], done: Iterable[int]) -> float:
    return sum(work[index] for index in done)


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
    units: list[Unit] = []
    dense: list[Group] = []
    # The solver may weigh errors otherwise than the allocation does: then their harms do not compare.
    comparable = config.column_weights == (config.cost == "sensitivity")
    for group, profile, entry in zip(groups, profiles, found.entries, strict=True):
        choice: Choice = entry.choice
        if isinstance(choice, Factors):
            units.append(Unit(group, choice, entry.cost * _per_cost(profile, config) if comparable else None))
            continue
        for layer, dtype in zip(group.layers, choice.dtypes, strict=True):
            alone = Group((layer,))
            if dtype == DENSE:
                dense.append(alone)
            else:
                units.append(Unit(alone, Quantized((dtype,)), None))
    if not units:
        raise UsageError(f"at ratio {config.ratio} nothing would change: choose a larger ratio")
    return Assignment(tuple(units), tuple(dense), _account(config, found, profiles, families))


def _costed(menu: Menu, profile: GroupProfile, config: CompressionConfig) -> Menu:
    per_cost = _per_cost(profile, config)
    entries = tuple(Entry(e.bits, e.cost / per_cost, e.choice) for e in menu.entries)
    return replace(menu, entries=entries)


def _per_cost(profile: GroupProfile, config: CompressionConfig) -> float:
    """Give the harm that one unit of the recipe's cost stands for."""
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
) -> dict[str, Any]:
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


def _weighting(config: CompressionConfig) -> dict[str, Any]:
    """Give what decides how errors are weighted."""
    keys = ("cost", "token_weights", "damping", "groups", "include", "exclude")
    return {key: getattr(config, key) for key in keys}


def _correct(
    corrections: Corrections,
    profile: GroupProfile,
    group: Group,
    objective: Objective,
    families: Families,
    method: Method,
) -> None:
    # Other learners take minutes for what HTP does in a second, and end within a few per cent of it.
    quick = method if isinstance(method.solver, HTP) or not method.solver.sparse else replace(method, solver=HTP())
    for name, side in families.curves(profile.in_features, profile.out_features).items():
        points = profile.points[name]
        point = points[len(points) // 2] if side == SPARSE else _middle(points, families)
        exact = objective.harm(_free(point, side, objective, group, quick).factorization.joined())
        if point.harm > 0:
            corrections.solved[f"{profile.sort} {side}"] = exact / point.harm
        # What rounding adds shows where the factors themselves lose least; elsewhere it drowns in their own error.
        finest = max(points, key=lambda p: (p.n_atoms, p.n_nonzero))
        found = _free(finest, side, objective, group, quick)
        exact = objective.harm(found.factorization.joined())
        for value_dtype, learned_dtype in families.dtypes:
            dictionary_dtype = "none" if side == SPARSE else learned_dtype
            stored = replace(_choice(finest, side), value_dtype=value_dtype, dictionary_dtype=dictionary_dtype)
            packed = rounded(stored, found, objective).factorization
            spec, tensors = pack_group(packed, method.format, value_dtype, {}, group.shared_input, dictionary_dtype)
            added = objective.harm(unpack_group(spec, tensors).joined()) - exact
            key = f"{profile.sort} {side} {value_dtype}"
            corrections.rounded[key] = max(added, 0.0) / profile.energy if profile.energy > 0 else 0.0
    for dtype in families.quantized:
        nearest = math.fsum(profile.quantized[dtype])
        rows = quantize_dense(objective.weight.T, objective.metric, dtype)
        if nearest > 0:
            weight = dequantize(rows.values, rows.scales, GRIDS[dtype]).T
            corrections.quantized[f"{profile.sort} {dtype}"] = objective.harm(weight) / nearest


def _choice(point: Point, side: str) -> Factors:
    if side == SPARSE:
        return Factors(point.n_atoms, point.n_nonzero, dictionary_dtype="none")
    return Factors(point.n_atoms, point.n_nonzero, side)  # type: ignore[arg-type]


def _free(point: Point, side: str, objective: Objective, group: Group, method: Method) -> Approximation:
    return approximate(_choice(point, side), objective, group, method)


def _middle(points: Sequence[Point], families: Families) -> Point:
    """Give a point of medium size and medium rho."""
    rho = families.rhos[len(families.rhos) // 2] if families.sparse else 1.0
    largest = max(p.n_atoms for p in points)
    return min(points, key=lambda p: (abs(p.n_atoms / largest - 0.55), abs(p.n_atoms / p.n_nonzero - rho)))
