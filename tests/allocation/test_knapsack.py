import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.allocation import knapsack
from cospadi.allocation.base import capacity_for
from cospadi.allocation.knapsack import Knapsack
from cospadi.allocation.menu import Entry, Menu, restrict
from cospadi.errors import UsageError
from tests.allocation.problems import cheapest, dynamic_programme, like_a_model, small_menus, span

EXACT = Knapsack(relative_gap=0.0)


def check(menus, capacity, found):
    """What holds of every allocation."""
    assert found.entries == tuple(m.entries[i] for m, i in zip(menus, found.indices, strict=True))
    assert found.bits == sum(e.bits for e in found.entries) <= capacity == found.capacity
    assert found.cost == math.fsum(e.cost for e in found.entries)
    assert 0 <= found.lower_bound <= found.cost
    assert 0 <= found.gap <= 1


@settings(deadline=None, max_examples=300)
@given(small_menus, st.floats(0, 1))
def test_the_best_choice_of_all(menus, place):
    low, high = span(menus)
    capacity = low + round(place * (high - low))
    found = EXACT.allocate(menus, capacity)
    check(menus, capacity, found)
    best = cheapest(menus, capacity)
    assert found.cost <= best * (1 + 1e-9)
    assert found.lower_bound <= best * (1 + 1e-9)
    assert found.gap <= 1e-9


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 40), st.sampled_from([0.2, 0.5, 0.9]))
def test_a_dynamic_programme_agrees(seed, n_menus, place):
    rng = np.random.default_rng(seed)
    menus = []
    for i in range(n_menus):
        bits = rng.integers(1, 60, 8)
        cost = 10.0 ** rng.uniform(-9, 3, 8)
        menus.append(Menu(f"g{i}", 60, tuple(Entry(int(b), float(c)) for b, c in zip(bits, cost, strict=True))))
    low, high = span(menus)
    capacity = low + int(place * (high - low))
    found = EXACT.allocate(menus, capacity)
    check(menus, capacity, found)
    assert found.cost == pytest.approx(dynamic_programme(menus, capacity), rel=1e-9, abs=0)


@pytest.mark.parametrize("seed", range(4))
def test_a_planted_choice_is_found(seed):
    # Costs that are a price times the bits saved, and more for every entry but the planted one: planted is the optimum.
    rng = np.random.default_rng(seed)
    menus, planted = [], []
    for i in range(200):
        bits = rng.integers(1000, 10**9, 20)
        cost = (2e9 - bits) * 1e-9 + rng.uniform(1e-6, 1e-3, 20)
        chosen = int(rng.integers(20))
        cost[chosen] = (2e9 - bits[chosen]) * 1e-9
        menus.append(Menu(f"g{i}", 10**9, tuple(Entry(int(b), float(c)) for b, c in zip(bits, cost, strict=True))))
        planted.append(chosen)
    capacity = sum(menu.entries[i].bits for menu, i in zip(menus, planted, strict=True))
    assert EXACT.allocate(menus, capacity).indices == tuple(planted)


def test_costs_of_very_different_size_are_all_decided():
    # What is undecided among the small costs vanishes beside the large ones, which any sensible choice avoids.
    menus = [Menu(f"big{i}", 1000, (Entry(1000, 0.0), Entry(999, 1e12))) for i in range(3)]
    rng = np.random.default_rng(0)
    small = []
    for i in range(8):
        pairs = zip(rng.integers(10, 50, 3), rng.uniform(1e-12, 2e-12, 3), strict=True)
        small.append(Menu(f"small{i}", 50, (Entry(50, 0.0), *(Entry(int(b), float(c)) for b, c in pairs))))
    low, _ = span(small)
    found = EXACT.allocate(menus + small, 3000 + low + 60)
    assert all(e.bits == 1000 for e in found.entries[:3])
    assert found.cost == pytest.approx(cheapest(small, low + 60), rel=1e-9, abs=0)
    assert found.gap <= 1e-9


@settings(deadline=None, max_examples=60)
@given(small_menus, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_more_capacity_never_costs_more(menus, places):
    low, high = span(menus)
    less, more = (EXACT.allocate(menus, low + round(p * (high - low))) for p in sorted(places))
    assert more.cost <= less.cost * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(small_menus, st.floats(0, 1), st.randoms(use_true_random=False))
def test_the_order_of_the_menus_does_not_matter(menus, place, random):
    low, high = span(menus)
    capacity = low + round(place * (high - low))
    shuffled = list(menus)
    random.shuffle(shuffled)
    one = dict(zip([m.name for m in menus], EXACT.allocate(menus, capacity).indices, strict=True))
    assert one == dict(zip([m.name for m in shuffled], EXACT.allocate(shuffled, capacity).indices, strict=True))


@pytest.mark.parametrize("factor", [2.0**-300, 2.0**-20, 2.0**600, 1e-9, 3.0])
def test_the_unit_of_cost_does_not_matter(factor):
    menus = like_a_model(30, 20, seed=1)
    scaled = [
        dataclasses.replace(m, entries=tuple(dataclasses.replace(e, cost=e.cost * factor) for e in m.entries))
        for m in menus
    ]
    capacity = sum(m.dense_bits for m in menus) // 2
    one, other = EXACT.allocate(menus, capacity), EXACT.allocate(scaled, capacity)
    assert one.indices == other.indices
    assert other.cost == pytest.approx(one.cost * factor, rel=1e-12, abs=0)
    assert other.lower_bound == pytest.approx(one.lower_bound * factor, rel=1e-9, abs=0)


def test_the_same_problem_has_the_same_answer():
    menus = like_a_model(60, 30, seed=2)
    capacity = sum(m.dense_bits for m in menus) // 3
    assert len({Knapsack().allocate(menus, capacity).indices for _ in range(3)}) == 1


@pytest.mark.parametrize("gap", [1e-2, 1e-6])
@pytest.mark.parametrize("kept", [0.8, 0.4, 0.15])
def test_the_gap_that_was_asked_for_is_proved_and_true(gap, kept):
    menus = like_a_model(50, 30, seed=3)
    capacity = int(kept * sum(m.dense_bits for m in menus))
    rough, exact = Knapsack(gap).allocate(menus, capacity), EXACT.allocate(menus, capacity)
    check(menus, capacity, rough)
    assert rough.gap <= gap * (1 + 1e-6)
    assert rough.lower_bound <= exact.cost * (1 + 1e-12)
    assert exact.lower_bound >= exact.cost * (1 - 1e-9)
    assert not rough.note
    assert rough.unused < 0.005


def test_a_capacity_that_cannot_be_met_names_the_smallest_that_can():
    menus = [Menu("a", 100, (Entry(100, 0.0), Entry(30, 1.0))), Menu("b", 100, (Entry(100, 0.0), Entry(60, 1.0)))]
    assert Knapsack().allocate(menus, 90).bits == 90
    with pytest.raises(UsageError, match=r"only 0\.445 of .* reached is 0\.45 of .* ratio of at most 0\.55,"):
        Knapsack().allocate(menus, 89)


@settings(deadline=None, max_examples=60)
@given(small_menus, st.floats(0.1, 0.99))
def test_the_ratio_that_an_error_advises_works(menus, part):
    smallest, _ = span(menus)
    with pytest.raises(UsageError, match="ask for a ratio of at most") as error:
        Knapsack().allocate(menus, int(part * smallest))
    advised = float(re.search("at most (.*?),", str(error.value))[1])
    assert Knapsack().allocate(menus, capacity_for(menus, advised)).bits <= capacity_for(menus, advised)
    least = smallest / sum(m.dense_bits for m in menus)
    assert advised == pytest.approx(1 - least, abs=1.01e-4)


def test_limits_hold():
    menus = like_a_model(12, 20, seed=4)
    menus[3] = restrict(menus[3], 0.0, 0.0)
    menus[5] = restrict(menus[5], 0.1, 0.3)
    capacity = sum(m.dense_bits for m in menus) // 2
    found = EXACT.allocate(menus, capacity)
    check(menus, capacity, found)
    assert found.entries[3].choice == "dense"
    assert 0.1 <= menus[5].removed(found.entries[5]) <= 0.3


def test_menus_with_nothing_to_decide():
    one = Menu("a", 10, (Entry(7, 3.0),))
    assert Knapsack().allocate([one], 7).indices == (0,)
    assert Knapsack().allocate([one], 7).gap == 0
    equal = [Menu(f"g{i}", 10, tuple(Entry(b, 1.0) for b in (10, 5, 3))) for i in range(5)]
    found = Knapsack().allocate(equal, 30)  # no cost is saved by spending more
    assert (found.bits, found.cost, found.gap) == (15, 5.0, 0)
    free = [Menu(f"g{i}", 10, (Entry(10, 0.0), Entry(4, 0.0))) for i in range(5)]
    found = Knapsack().allocate(free, 50)
    assert (found.cost, found.lower_bound, found.gap, found.bits) == (0, 0, 0, 20)
    for menus in ([], [one, one]):
        with pytest.raises(UsageError, match="each named differently"):
            Knapsack().allocate(menus, 100)


def test_everything_dense_when_there_is_room_for_it():
    menus = like_a_model(20, 10, seed=5)
    found = Knapsack().allocate(menus, sum(m.dense_bits for m in menus))
    assert found.cost == found.gap == 0
    assert all(e.choice == "dense" for e in found.entries)


@pytest.mark.parametrize("options", [{"relative_gap": -1e-9}, {"relative_gap": 1.0}, {"time_limit": 0.0}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UsageError, match="expected 0 <= relative_gap < 1 and more than 0 seconds"):
        Knapsack(**options)


def test_hitting_the_time_limit_is_said_and_gives_the_greedy_choice():
    menus = like_a_model(300, 40, seed=6)
    capacity = int(0.37 * sum(m.dense_bits for m in menus))
    found = Knapsack(relative_gap=0.0, time_limit=1e-9).allocate(menus, capacity)
    check(menus, capacity, found)
    assert found.note.startswith("the time limit of 1e-09 s was reached")
    exact = Knapsack(relative_gap=1e-9).allocate(menus, capacity)
    assert found.lower_bound <= exact.cost <= found.cost <= exact.cost * 1.01
    assert found.gap > 0


@pytest.mark.parametrize("give", ["nothing", "a poor choice", "a failure"])
def test_whatever_highs_comes_back_with_is_said_and_never_made_worse(monkeypatch, give):
    menus = like_a_model(40, 30, seed=7)
    capacity = int(0.37 * sum(m.dense_bits for m in menus))
    exact = EXACT.allocate(menus, capacity)
    real = knapsack.milp

    def stopped(objective, **problem):
        result = real(objective, **problem)
        result.mip_dual_bound = 0.0
        result.status = 4 if give == "a failure" else 1
        result.message = "numbers went wrong"
        result.x = np.zeros_like(result.x) if give == "a poor choice" else None
        return result

    monkeypatch.setattr(knapsack, "milp", stopped)
    found = EXACT.allocate(menus, capacity)
    check(menus, capacity, found)
    assert found.lower_bound <= exact.cost * (1 + 1e-12)
    assert exact.cost < found.cost <= exact.cost * 1.05
    expected = {"nothing": "a greedy one is kept", "a poor choice": "the best of them is kept"}
    assert expected.get(give, "numbers went wrong; greedy choice kept") in found.note


def test_a_row_exceeded_by_rounding_is_solved_again_within_the_capacity(monkeypatch):
    menus = like_a_model(40, 30, seed=7)
    capacity = int(0.37 * sum(m.dense_bits for m in menus))
    exact = EXACT.allocate(menus, capacity)
    real = knapsack.milp
    calls = []

    def loose(objective, *, constraints, **problem):
        one_each, row = constraints
        calls.append(float(row.ub[0]))
        if len(calls) > 1:
            return real(objective, constraints=constraints, **problem)
        # As if the tolerance of the row were huge; the bound of such a solve would be worthless.
        result = real(objective, constraints=[one_each, type(row)(row.A, row.lb + 3000, row.ub + 3000)], **problem)
        result.mip_dual_bound = 0.0
        return result

    monkeypatch.setattr(knapsack, "milp", loose)
    found = EXACT.allocate(menus, capacity)
    check(menus, capacity, found)
    assert len(calls) > 1
    assert calls[1] < calls[0]
    assert found.lower_bound <= exact.cost * (1 + 1e-12)
    assert found.cost <= exact.cost * 1.05


def test_a_thousand_groups_of_sixty_entries():
    menus = like_a_model(1000, 60, seed=8, decades=12)
    capacity = int(0.6 * sum(m.dense_bits for m in menus))
    found = Knapsack().allocate(menus, capacity)
    check(menus, capacity, found)
    assert found.gap <= 1e-5
    assert found.unused < 0.005
    assert not found.note
