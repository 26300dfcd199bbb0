"""From recipe and profiles to a plan, on synthetic layers."""

import pytest
import torch

from cospadi.allocation.assignment import STRATEGIES, allocate, check_plan, families_of, uniform_assignment
from cospadi.allocation.choices import Factors, Method, Quantized
from cospadi.allocation.offers import Corrections, menu
from cospadi.allocation.profile import SPARSE
from cospadi.calibration.source_statistics import SourceStatistics
from cospadi.errors import UsageError
from cospadi.executors.local import SerialExecutor
from cospadi.formats.base import FORMATS
from cospadi.formats.packing import group_bits, pack_group, unpack_group
from cospadi.models.groups import Group
from cospadi.models.layers import Layer
from cospadi.pipeline.approximate import approximate, rounded
from cospadi.pipeline.group_inputs import GroupInputs
from cospadi.pipeline.job import Job, Workplace
from cospadi.pipeline.mapped_model import MappedModel
from cospadi.pipeline.measure_costs import measure_corrections, profile_groups
from cospadi.pipeline.statistics_store import Measurements
from cospadi.recipe.options import CompressionConfig
from cospadi.solvers.base import SOLVERS
from cospadi.whitening.objective import build_objective

WIDTH = 24
SHAPES = {"q": 20, "k": 8, "up": 40, "down": 23}


def normal(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def method(name="htp", format="bitmask"):
    options = {"n_iter": 2} if name == "htp" else {}
    return Method(name, SOLVERS.create(name, options), format, 0)


class World:
    """Two blocks of layers with statistics; q and k share their input.

    The loss is a hundred times more sensitive to block 1.
    """

    def __init__(self):
        self.statistics, self.weights, self.groups = {}, {}, []
        for block in range(2):
            for index, kinds in enumerate((("q", "k"), ("up",), ("down",))):
                names = [f"b.{block}.{kind}" for kind in kinds]
                layers = tuple(
                    Layer(name, block, kind, names[0], WIDTH, SHAPES[kind], False)
                    for name, kind in zip(names, kinds, strict=True)
                )
                seed = 100 * block + 10 * index
                own = SourceStatistics(names[0], WIDTH, {la.name: la.out_features for la in layers})
                sizes = torch.arange(1, WIDTH + 1.0, dtype=torch.float64) ** -0.7
                x = normal(seed, 150, WIDTH) * sizes @ torch.linalg.qr(normal(seed + 1, WIDTH, WIDTH)).Q
                own.add_inputs(x)
                own.n_tokens = 150
                for i, layer in enumerate(layers):
                    own.layers[layer.name].add(10.0**block * normal(seed + 3 + i, 150, layer.out_features))
                    own.layers[layer.name].n_tokens = 150
                    self.weights[layer.name] = normal(seed + 5 + i, WIDTH, layer.out_features)
                self.statistics[names[0]] = own
                self.groups.append(Group(layers))
        self.made = []

    @property
    def singles(self):
        return [Group((layer,)) for group in self.groups for layer in group.layers]

    def reader(self, group):
        def read():
            self.made.append(group.name)
            weights = {layer.name: self.weights[layer.name] for layer in group.layers}
            return GroupInputs(weights, {}, {layer.source: self.statistics[layer.source] for layer in group.layers})

        return read

    def objective(self, config, group):
        weights = [self.weights[layer.name] for layer in group.layers]
        weighted = config.cost == "sensitivity"
        return build_objective(group, weights, self.statistics, config.damping, column_weights=weighted)

    def job(self, config, measurements, own=None, groups=None, tell=lambda event: None):
        """What planning sees of a run: no model, but what reads the inputs of its groups."""
        model = MappedModel(source=None, map=None, groups=tuple(groups or self.groups), windows=None)
        place = Workplace(SerialExecutor("cpu", 1), self.reader, budget=None, scratch=None)
        return Job(config, own or method(), "", model, measurements, place, tell)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def measurements(tmp_path_factory):
    return Measurements(tmp_path_factory.mktemp("measurements"), {"one": 1})


def recipe(**more):
    return CompressionConfig(**({"weight_dtypes": ("int8", "int4g32"), "ratio": 0.4} | more))


@pytest.fixture
def plan(world, measurements):
    """Allocate without corrections; gives the assignment and the profiles."""

    def plan(config, own=None, groups=None):
        own, groups = own or method(), groups or world.groups
        families = families_of(config, own)
        profiles = profile_groups(world.job(config, measurements, own, groups), families)
        return allocate(config, own, families, groups, profiles, Corrections())

    return plan


def plan_bits(unit, format="bitmask"):
    choice, group = unit.choice, unit.group
    codec = FORMATS.create(format)
    if isinstance(choice, Quantized):
        (layer,), (dtype,) = group.layers, choice.dtypes
        n = layer.out_features
        return group_bits(WIDTH, n, [n], 0, FORMATS.create("identity"), "none", dtype)
    sizes = (choice.n_atoms, group.out_features, choice.n_nonzero)
    return group_bits(WIDTH, *sizes, codec, choice.value_dtype, choice.dictionary_dtype, choice.side)


def dense_bits(groups):
    return sum(16 * layer.in_features * layer.out_features for group in groups for layer in group.layers)


def removed(assignment, groups, format="bitmask"):
    """Give the fraction of the bits removed, and check that every layer has its place once."""
    names = [layer.name for unit in assignment.groups for layer in unit.group.layers]
    names += [layer.name for group in assignment.dense for layer in group.layers]
    assert sorted(names) == sorted(layer.name for group in groups for layer in group.layers)
    assert all(unit.choice.kind != "dense" for unit in assignment.groups)
    assert all(len(group.layers) == 1 for group in assignment.dense)
    bits = sum(plan_bits(unit, format) for unit in assignment.groups) + dense_bits(assignment.dense)
    return 1 - bits / dense_bits(groups)


# What is offered


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"sides": ("input", "output"), "rhos": (2.0, 3.0), "learned": True, "identity": True, "sparse": True}),
        ({"side": "output"}, {"sides": ("output",)}),
        ({"side": "input", "rho": 2.5}, {"sides": ("input",), "rhos": (2.5,)}),
        ({"storage": "quantized"}, {"dtypes": (), "quantized": ("int8", "int4g32")}),
        ({"storage": "factors"}, {"dtypes": (("bfloat16", "bfloat16"), ("int8", "int8")), "quantized": ()}),
        ({"value_dtype": "bfloat14"}, {"dtypes": (("bfloat14", "bfloat16"),)}),
        ({"dictionary": "learned"}, {"learned": True, "identity": False}),
        ({"dictionary": "identity"}, {"learned": False, "identity": True}),
    ],
)
def test_families_are_what_the_recipe_says(options, expected):
    found = families_of(recipe(**options), method())
    assert {key: getattr(found, key) for key in expected} == expected


def test_solvers_that_cannot_are_not_offered_the_other_side():
    assert families_of(recipe(), method("orthogonal")).sides == ("input",)
    with pytest.raises(UsageError, match="side 'output' needs a solver with a metric on both sides: htp"):
        families_of(recipe(side="output"), method("orthogonal"))
    low_rank = families_of(recipe(), method("svd", "dense"))
    assert (low_rank.sparse, low_rank.identity, low_rank.sides) == (False, False, ("input",))


# Budgets


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("cost", ["sensitivity", "functional-error", "relative-error"])
def test_every_strategy_and_cost_meets_the_ratio_from_below(strategy, cost, plan, world):
    for ratio in (0.25, 0.6):
        config = recipe(allocation=strategy, cost=cost, ratio=ratio)
        found = plan(config)
        reached = removed(found, world.groups)
        # Half a bit: the bits that remain are rounded to whole ones.
        assert reached >= ratio - 0.5 / dense_bits(world.groups)
        # A group may have nothing between two sizes; the knapsack fills up with others.
        assert reached < ratio + (0.02 if strategy == "knapsack" else 0.2)
        account = found.account
        assert (account["strategy"], account["cost"]) == (strategy, cost)
        assert account["unused"] == pytest.approx((reached - ratio) / (1 - ratio), abs=1e-4)
        assert account["predicted_cost"] > 0
        assert (account["gap"] is not None) == (strategy == "knapsack")


@pytest.mark.parametrize("storage", ["factors", "quantized"])
@pytest.mark.parametrize("dictionary", ["learned", "identity"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_what_is_asked_for_is_chosen(storage, dictionary, side, plan, world):
    # Groups of several layers have no side of the outputs.
    found = plan(recipe(storage=storage, dictionary=dictionary, side=side, ratio=0.3), groups=world.singles)
    assert removed(found, world.singles) >= 0.3 - 1e-5
    for unit in found.groups:
        if storage == "quantized":
            assert isinstance(unit.choice, Quantized)
            assert unit.predicted is None
        else:
            assert unit.choice.kind == ("sparse" if dictionary == "identity" else "factors")
            assert unit.choice.side == ("input" if dictionary == "identity" else side)
            assert unit.predicted > 0


def test_the_same_recipe_gives_the_same_plan_whatever_the_order_of_the_groups(plan, world):
    found, turned = plan(recipe()), plan(recipe(), groups=world.groups[::-1])
    assert plan(recipe()) == found
    assert {unit.group.name: unit for unit in found.groups} == {unit.group.name: unit for unit in turned.groups}


def test_the_loss_decides_under_sensitivity_and_not_otherwise(plan, world):
    def kept(cost):
        found = plan(recipe(cost=cost, ratio=0.7, storage="factors"))
        bits = [0, 0]
        for unit in found.groups:
            bits[unit.group.layers[0].block] += plan_bits(unit)
        for group in found.dense:
            bits[group.layers[0].block] += dense_bits([group])
        return bits[1] / sum(bits)

    functional = kept("functional-error")
    assert 0.45 < functional < 0.55
    assert 0.45 < kept("relative-error") < 0.55
    assert kept("sensitivity") > functional + 0.05


def test_the_knapsack_is_never_worse_than_the_others(plan):
    costs = {
        strategy: plan(recipe(allocation=strategy, ratio=0.4)).account["predicted_cost"] for strategy in STRATEGIES
    }
    assert costs["knapsack"] == min(costs.values())


def test_predictions_are_in_units_of_loss_increase_under_every_cost(plan):
    """A relative cost is divided by the energy for the sum alone."""
    shared = {"allocation": "equal-ratio", "storage": "factors"}
    plain = plan(recipe(cost="functional-error", column_weights=False, **shared))
    relative = plan(recipe(cost="relative-error", column_weights=False, **shared))
    assert [u.choice for u in plain.groups] == [u.choice for u in relative.groups]
    assert [u.predicted for u in plain.groups] == pytest.approx([u.predicted for u in relative.groups], rel=1e-9)
    assert plain.account["predicted_cost"] == pytest.approx(sum(u.predicted for u in plain.groups), rel=1e-9)
    # A solver that weighs errors otherwise than the allocation ends with a loss increase that compares with nothing.
    for options in ({"cost": "functional-error"}, {"cost": "sensitivity", "column_weights": False}):
        assert all(unit.predicted is None for unit in plan(recipe(**options, **shared)).groups)


# Limits


def test_a_limit_of_nothing_keeps_layers_dense_within_the_budget(plan, world):
    found = plan(recipe(ratio=0.3, limits=("*.down=0:0",)))
    dense = {layer.name for group in found.dense for layer in group.layers}
    assert {"b.0.down", "b.1.down"} <= dense
    assert removed(found, world.groups) >= 0.3 - 1e-5


def test_limits_bound_what_a_group_loses(plan):
    def lost(found):
        by_group = {}
        for unit in found.groups:
            name = unit.group.layers[0].source
            by_group[name] = by_group.get(name, 0) + dense_bits([unit.group]) - plan_bits(unit)
        shapes = {"q": 28, "up": 40, "down": 23}
        return {
            f"b.{b}.{kind}": by_group.get(f"b.{b}.{kind}", 0) / (16 * WIDTH * n)
            for b in range(2)
            for kind, n in shapes.items()
        }

    found = lost(plan(recipe(ratio=0.4, limits=("*=0.2:0.6", "b.1.*=0.3:0.5", "*.q=0.1:0.45"))))
    assert all(0.1 - 1e-9 <= found[f"b.{b}.q"] <= 0.45 + 1e-9 for b in range(2))
    assert all(0.2 - 1e-9 <= found[f"b.0.{kind}"] <= 0.6 + 1e-9 for kind in ("up", "down"))
    assert all(0.3 - 1e-9 <= found[f"b.1.{kind}"] <= 0.5 + 1e-9 for kind in ("up", "down"))
    # A floor forces what the cost would not do.
    free = lost(plan(recipe(ratio=0.3)))
    forced = lost(plan(recipe(ratio=0.3, limits=("b.1.up=0.6:1",))))
    assert free["b.1.up"] < 0.6 <= forced["b.1.up"] + 1e-9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratio": 0.5, "limits": ("*=0:0.3",)}, "cannot keep only 0.5 of the dense bytes"),
        ({"ratio": 0.99}, "ask for a ratio of at most"),
        ({"ratio": 0.3, "limits": ("*=0:0",)}, "ask for a ratio of at most 0,"),
        ({"ratio": 0.3, "limits": ("*.up=0.98:1",)}, "b.0.up: no way of storing it"),
        ({"ratio": 1e-9, "limits": ("*=0:0",)}, "nothing would change"),
    ],
)
def test_what_cannot_be_met_is_said(options, text, plan):
    with pytest.raises(UsageError) as caught:
        plan(recipe(**options))
    assert text in str(caught.value)


def test_a_limit_on_any_member_bounds_its_group(plan):
    found = plan(recipe(ratio=0.3, limits=("*.k=0:0",)))
    dense = {layer.name for group in found.dense for layer in group.layers}
    assert {"b.0.q", "b.0.k", "b.1.q", "b.1.k"} <= dense


@pytest.mark.parametrize(
    ("options", "solver", "text"),
    [
        ({"limits": ("*=0:1", "*.gate=0:0.3")}, "htp", r"limit '\*.gate=0:0.3' matches no layer; .* 'b.0.q'"),
        ({"side": "output"}, "orthogonal", "side 'output' needs a solver with a metric on both sides: htp"),
        ({"allocation": "uniform", "ratio": 0.999}, "htp", "no layer is large enough"),
    ],
)
def test_what_cannot_work_is_said_beforehand(options, solver, text, world):
    check_plan(recipe(), method(), world.groups)
    with pytest.raises(UsageError, match=text):
        check_plan(recipe(**options), method(solver), world.groups)


# The paper's convention, uniform


def test_the_papers_convention_spends_its_own_bits(plan, world):
    found = plan(recipe(convention="paper", storage="factors", dictionary="learned", side="input", ratio=0.3))
    bits = dense_bits(found.dense)
    for unit in found.groups:
        choice = unit.choice
        bits += 16 * (choice.n_atoms * WIDTH + choice.n_nonzero * sum(unit.group.out_features))
    assert bits <= 0.7 * dense_bits(world.groups) + 0.5
    assert bits > 0.69 * dense_bits(world.groups)


@pytest.mark.parametrize("value_dtype", ["auto", "int8"])
def test_uniform_gives_every_group_the_ratio(value_dtype, world):
    found = uniform_assignment(recipe(allocation="uniform", ratio=0.3, value_dtype=value_dtype), method(), world.groups)
    assert found.account == {"strategy": "uniform"}
    assert 0.3 <= removed(found, world.groups) < 0.45
    for unit in found.groups:
        assert unit.predicted is None
        assert unit.choice.value_dtype == ("bfloat16" if value_dtype == "auto" else "int8")
        assert plan_bits(unit) <= 0.7 * dense_bits([unit.group])
    with pytest.raises(UsageError, match="no layer is large enough"):
        uniform_assignment(recipe(allocation="uniform", ratio=0.999), method(), world.groups)


# Measured once


def test_profiles_are_measured_once_and_grow(world, tmp_path):
    kept = Measurements(tmp_path, {})

    def profiles(**more):
        config = recipe(**more)
        world.made.clear()
        steps = []
        found = profile_groups(world.job(config, kept, tell=steps.append), families_of(config, method()))
        made = len(world.made)
        # Whoever measures says first that the stage begins.
        assert [(step.done, step.total) for step in steps] == [(i, 6) for i in range(0 if made else 1, 7)]
        assert all(step.resumed == (made == 0) for step in steps)
        work = [step.work_done for step in steps]
        assert work == sorted(set(work))
        assert work[-1] == pytest.approx(steps[-1].work_total)
        return found, made

    first, made = profiles(storage="quantized")
    assert made == 6
    assert all(not profile.points for profile in first)
    again, made = profiles(storage="quantized", ratio=0.7, seed=3, column_weights=False, allocation="equal-ratio")
    assert (again, made) == (first, 0)
    grown, made = profiles()
    assert made == 6
    assert all(profile.quantized == before.quantized for profile, before in zip(grown, first, strict=True))
    assert profiles(storage="factors", dictionary="identity") == (grown, 0)
    spectral, made = profiles(allocation="pooled-spectrum")
    assert made == 6
    assert all(len(profile.spectrum) == min(WIDTH, sum(profile.out_features)) for profile in spectral)
    # What decides the weighting has profiles of its own.
    assert profiles(storage="quantized", cost="functional-error")[1] == 6
    assert profiles(storage="quantized", damping=1e-3)[1] == 6


def test_corrections_are_what_solving_and_rounding_did(world, tmp_path, monkeypatch):
    config, own = recipe(), method()
    families, kept = families_of(config, own), Measurements(tmp_path, {})
    profiles = profile_groups(world.job(config, kept), families)
    steps = []
    found = measure_corrections(world.job(config, kept, own, tell=steps.append), families, profiles)
    assert [(step.done, step.total, step.resumed) for step in steps] == [(i, 3, False) for i in range(4)]
    assert {key.split()[0] for key in found.solved} == {"qx2", "upx1", "downx1"}
    assert {key.split()[1] for key in found.solved} == {"input", "output", SPARSE}
    assert "downx1 output" in found.solved
    assert not {"qx2 output", "upx1 output"} & set(found.solved)
    assert all(0 < ratio < 1.2 for ratio in found.solved.values())
    assert all(0 <= part < 0.1 for part in found.rounded.values())
    assert all(0 < ratio < 1.5 for ratio in found.quantized.values())
    # The second of the two is the middle one; its sparse corrections, computed by hand.
    group, profile = world.groups[4], profiles[4]
    assert group.name == "b.1.up"
    given, points = world.objective(config, group), profile.points[SPARSE]

    def solved(point, value_dtype):
        choice = Factors(point.n_atoms, point.n_nonzero, "input", value_dtype, "none")
        found = rounded(choice, approximate(choice, given, group, own), given).factorization
        stored = unpack_group(*pack_group(found, "bitmask", value_dtype, {}, True, "none"))
        return given.loss_increase(found.joined()), given.loss_increase(stored.joined())

    middle = points[len(points) // 2]
    exact = solved(middle, "bfloat16")[0]
    assert found.solved["upx1 sparse"] == pytest.approx(exact / middle.loss_increase, rel=1e-9)
    for value_dtype in ("bfloat16", "int8"):
        free, stored = solved(points[-1], value_dtype)
        expected = max(stored - free, 0.0) / profile.energy
        assert found.rounded[f"upx1 sparse {value_dtype}"] == pytest.approx(expected, rel=1e-6, abs=1e-12)
    # Kept, for any ratio; with another solver measured again.
    world.made.clear()
    steps.clear()
    again = world.job(recipe(ratio=0.7), kept, own, tell=steps.append)
    assert measure_corrections(again, families, profiles) == found
    assert world.made == []
    assert [(step.done, step.resumed) for step in steps] == [(1, True), (2, True), (3, True)]
    monkeypatch.setattr("cospadi.pipeline.measure_costs._correct", lambda *given: None)
    other = measure_corrections(world.job(config, kept, method("orthogonal")), families, profiles)
    assert other == Corrections()
    assert world.made == ["b.1.q", "b.1.up", "b.1.down"]
    # They make the prediction of the menu exact where they were measured, up to what rounding adds.
    entries = menu(profile, families, "bitmask", found).entries
    wanted = Factors(WIDTH, middle.n_nonzero, "input", "bfloat16", "none")
    costs = [entry.cost for entry in entries if entry.choice == wanted]
    assert costs == pytest.approx([exact + found.rounded["upx1 sparse bfloat16"] * profile.energy], rel=1e-9)
