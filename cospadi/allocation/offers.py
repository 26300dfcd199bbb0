"""What may be chosen for a group: every way of storing it with its bytes and its predicted loss increase."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cospadi.allocation.choices import DENSE, Factors, Quantized, kept_dense, sides
from cospadi.allocation.curves import ErrorCurve
from cospadi.allocation.menu import Entry, Menu
from cospadi.allocation.profile import SPARSE, Families, GroupProfile, Point, along_atoms
from cospadi.errors import CheckpointError
from cospadi.formats import FORMATS, Format, dictionary_bits, group_bits

_STEPS = 48
"""Entries of a menu along one curve."""


@dataclass(frozen=True)
class Corrections:
    """What the real solver and rounding made of the profile's estimates, on a sample of groups.

    Attributes
    ----------
    solved : dict of str to float
        Loss increase by the solver over that of the profile, by "kind side", with ``GroupProfile.group_kind``.
    rounded : dict of str to float
        Loss increase added by rounding factors to a dtype over the group's energy, by "kind side dtype".
    quantized : dict of str to float
        Loss increase of the weights rounded with regard to errors over that of rounding to nearest, by "kind dtype".
    """

    solved: dict[str, float] = field(default_factory=dict)
    rounded: dict[str, float] = field(default_factory=dict)
    quantized: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Give a text that ``from_json`` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Corrections":
        """Read what ``to_json`` gave.

        Raises
        ------
        CheckpointError
            It is something else.
        """
        try:
            data = json.loads(text)
            parts = {key: {str(kind): float(value) for kind, value in data[key].items()} for key in asdict(cls())}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"not saved corrections ({error})") from error
        return cls(**parts)

    def solving(self, kind: str, side: str) -> float:
        """Give the factor for factors of one side; 1 where nothing was measured."""
        return self.solved.get(f"{kind} {side}", 1.0)

    def rounding(self, kind: str, model: Factors) -> float:
        """Give what rounding adds to factors, as a fraction of the energy."""
        place = SPARSE if model.dictionary_dtype == "none" else model.side
        return self.rounded.get(f"{kind} {place} {model.value_dtype}", 0.0)

    def weights(self, kind: str, dtype: str) -> float:
        """Give the factor for weights in a dtype."""
        return self.quantized.get(f"{kind} {dtype}", 1.0)


def menu(
    profile: GroupProfile, families: Families, format: str, corrections: Corrections, convention: str = "honest"
) -> Menu:
    """List every way of storing one group with its bits and its predicted loss increase.

    Parameters
    ----------
    profile : GroupProfile
        Of the group.
    families : Families
        What to offer, at most what was profiled.
    format : str
        Registry name of the coefficients' format.
    corrections : Corrections
        Ratios of the real solver's loss increase to the profile's.
    convention : {"honest", "paper"}
        Whether the mask counts; see ``Budget``.
    """
    codec = FORMATS.create(format)
    entries = [Entry(profile.dense_bits, 0.0, kept_dense(len(profile.out_features)))]
    for name, side in families.curves(profile.in_features, profile.out_features).items():
        points = profile.points[name]
        if side == SPARSE:
            entries += _sparse_entries(profile, families, codec, corrections, convention)
            continue
        offered = families if side == "input" else families.for_outputs()
        for value_dtype, dictionary_dtype in families.dtypes:
            model = Factors(0, 0, side, value_dtype, dictionary_dtype)  # type: ignore[arg-type]
            extra = corrections.rounding(profile.group_kind, model) * profile.energy
            for (k, s), increase in _curves(points, offered):
                choice = replace(model, n_atoms=k, n_nonzero=s)
                cost = increase * corrections.solving(profile.group_kind, side) + extra
                entries.append(Entry(factor_bits(choice, profile, codec, convention), cost, choice))
    entries += _quantized_entries(profile, families, corrections)
    useful = [e for e in entries if e.bits < profile.dense_bits or e.cost == 0]
    spectrum = np.asarray(profile.spectrum) if profile.spectrum else None
    return Menu(profile.name, profile.dense_bits, tuple(useful), spectrum)


def factor_bits(choice: Factors, profile: GroupProfile, codec: Format, convention: str) -> int:
    """Count the bits that factors take on disk, or by the paper's convention 16 for each number."""
    k, s = choice.n_atoms, choice.n_nonzero
    if convention == "paper":
        d, columns = sides(choice, profile.in_features, profile.out_features)
        return 16 * ((0 if choice.dictionary_dtype == "none" else k * d) + s * sum(columns))
    return group_bits(
        profile.in_features,
        k,
        profile.out_features,
        s,
        codec,
        choice.value_dtype,
        choice.dictionary_dtype,
        choice.side,
    )


def interpolation_errors(profile: GroupProfile, families: Families) -> NDArray[np.float64]:
    """Give the relative errors of the curves at each inner point, computed from the others."""
    found: list[NDArray[np.float64]] = []
    for name, side in families.curves(profile.in_features, profile.out_features).items():
        points = profile.points[name]
        if side == SPARSE:
            curve = ErrorCurve.through([p.n_nonzero for p in points], [p.loss_increase for p in points])
            found.append(curve.leave_one_out())
            continue
        for rho in (families if side == "input" else families.for_outputs()).rhos:
            along = along_atoms(points, rho, families)
            if len(along) > 2:
                found.append(
                    ErrorCurve.through([p.n_atoms for p in along], [p.loss_increase for p in along]).leave_one_out()
                )
    return np.concatenate(found) if found else np.zeros(0)


def _curves(points: Sequence[Point], families: Families) -> list[tuple[tuple[int, int], float]]:
    """Interpolate the loss increase: along the atoms for each rho, and along the non-zeros of a complete dictionary."""
    most = max(p.n_atoms for p in points)
    found: dict[tuple[int, int], float] = {}
    for rho in families.rhos if families.sparse else (1.0,):
        along = along_atoms(points, rho, families)
        curve = ErrorCurve.through([p.n_atoms for p in along], [p.loss_increase for p in along])
        between = _between(along[0].n_atoms, most)
        for k, increase in zip(between, curve(between).tolist(), strict=True):
            found[(k, max(1, int(k / rho)) if families.sparse else k)] = increase
    complete = sorted((p for p in points if p.n_atoms == most), key=lambda p: p.n_nonzero)
    if families.sparse and len(complete) > 1:
        curve = ErrorCurve.through([p.n_nonzero for p in complete], [p.loss_increase for p in complete])
        between = _between(complete[0].n_nonzero, complete[-1].n_nonzero)
        found |= {(most, s): increase for s, increase in zip(between, curve(between).tolist(), strict=True)}
    return list(found.items())


def _between(low: int, high: int) -> list[int]:
    return sorted({round(x) for x in np.linspace(low, high, _STEPS)})


def _sparse_entries(
    profile: GroupProfile, families: Families, codec: Format, corrections: Corrections, convention: str
) -> list[Entry]:
    points, d = profile.points[SPARSE], profile.in_features
    curve = ErrorCurve.through([p.n_nonzero for p in points], [p.loss_increase for p in points])
    entries = []
    for value_dtype, _ in families.dtypes:
        model = Factors(d, 0, "input", value_dtype, "none")
        extra = corrections.rounding(profile.group_kind, model) * profile.energy
        between = _between(points[0].n_nonzero, points[-1].n_nonzero)
        for s, increase in zip(between, curve(between).tolist(), strict=True):
            choice = replace(model, n_nonzero=s)
            cost = increase * corrections.solving(profile.group_kind, SPARSE) + extra
            entries.append(Entry(factor_bits(choice, profile, codec, convention), cost, choice))
    return entries


def _quantized_entries(profile: GroupProfile, families: Families, corrections: Corrections) -> list[Entry]:
    """List the undominated combinations of dtypes over the members."""
    identity = FORMATS.create("identity")
    partial: list[Entry] = [Entry(0, 0.0, ())]
    for index, width in enumerate(profile.out_features):
        dense = 16 * profile.in_features * width
        ways = [(dense, 0.0, DENSE)]
        for dtype in families.quantized:
            bits = dictionary_bits(width, profile.in_features, dtype) + identity.bits(width, width, 0, "none")
            cost = profile.quantized[dtype][index] * corrections.weights(profile.group_kind, dtype)
            ways.append((bits, cost, dtype))
        joined = [
            Entry(entry.bits + bits, entry.cost + cost, (*entry.choice, dtype))
            for entry in partial
            for bits, cost, dtype in ways
        ]
        partial, least = [], float("inf")
        for entry in sorted(joined, key=lambda e: (e.bits, e.cost, e.choice)):
            if entry.cost < least:
                partial.append(entry)
                least = entry.cost
    return [Entry(e.bits, e.cost, Quantized(e.choice)) for e in partial if set(e.choice) != {DENSE}]
