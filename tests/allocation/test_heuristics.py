"""Uniform and pooled allocation over menus, and spending what is left."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.allocation.equal_ratio import EqualRatio
from cospadi.allocation.knapsack import Knapsack
from cospadi.allocation.menu import Entry, Menu, restrict
from cospadi.allocation.pooled import PooledSpectrum, kept_fractions
from cospadi.allocation.rest import spend_rest
from cospadi.errors import NumericalError, UsageError
from tests.allocation.problems import like_a_model, small_menus, span


def fine(name, dense, spectrum=None, n=200):
    """A menu with an entry for each 1/n of the dense bits."""
    found = [Entry(max(1, dense * j // n), 1 - j / n, j / n) for j in range(1, n + 1)]
    return Menu(name, dense, tuple(found), spectrum)


# --- the same ratio for all


@settings(deadline=None)
@given(small_menus, st.floats(0, 1))
def test_uniform_takes_the_least_cost_that_fits_each_groups_part(menus, kept):
    dense = sum(m.dense_bits for m in menus)
    capacity = int(kept * dense)
    found = EqualRatio().allocate(menus, capacity)
    fits = []
    for menu, entry in zip(menus, found.entries, strict=True):
        fitting = [e for e in menu.entries if e.bits * dense <= capacity * menu.dense_bits]
        fits.append(entry.bits * dense < (capacity + 1) * menu.dense_bits)
        assert fits[-1] >= bool(fitting)
        assert not fitting or entry.cost <= min(e.cost for e in fitting)
        assert fits[-1] or entry.bits == min(e.bits for e in menu.entries)
    assert (found.bits <= capacity) or not all(fits)
    assert bool(found.note) == (not all(fits))
    assert found.lower_bound is None
    assert found.gap is None


def test_uniform_takes_an_entry_that_removes_exactly_the_ratio():
    menus = [Menu("a", 100, (Entry(100, 0.0), Entry(70, 1.0), Entry(60, 2.0))), Menu("b", 233, (Entry(150, 1.0),))]
    found = EqualRatio().allocate(menus, int(0.7 * 333))
    assert found.entries[0].bits == 70


def test_uniform_keeps_dense_what_has_nothing_else_and_says_so():
    menus = [Menu("a", 100, (Entry(100, 0.0),)), Menu("b", 100, (Entry(100, 0.0), Entry(50, 1.0)))]
    found = EqualRatio().allocate(menus, 120)
    assert [e.bits for e in found.entries] == [100, 50]
    assert found.bits == 150
    assert found.unused < 0
    assert "1 of 2 groups" in found.note
    assert "(a); 0.75 of the dense bytes remain, 0.6 were asked for" in found.note


# --- pooled spectrum


def test_the_cut_keeps_the_largest_normalised_values():
    flat, steep = np.ones(10), np.array([100.0] + [1.0] * 9)  # steep is one direction, whatever its scale
    menus = [fine("flat", 1000, flat), fine("steep", 1000, steep)]
    assert kept_fractions(menus, 1100) == pytest.approx([1.0, 0.1])
    assert kept_fractions([fine("flat", 1000, 1e-200 * flat), menus[1]], 1100) == pytest.approx([1.0, 0.1])
    assert kept_fractions(menus, 500) == pytest.approx([0.4, 0.1])
    assert kept_fractions([*menus, fine("zero", 1000, np.zeros(10))], 1100)[2] == 0


def test_pooled_follows_the_cut_within_the_limits_and_meets_the_capacity():
    flat, steep = np.ones(10), np.array([100.0] + [1.0] * 9)
    menus = [fine("flat", 1000, flat), fine("steep", 1000, steep)]
    found = PooledSpectrum().allocate(menus, 1100)
    assert [e.bits for e in found.entries] == [1000, 100]
    found = PooledSpectrum(ceiling=0.7).allocate(menus, 1100)  # steep keeps 300, so flat must give
    assert [e.bits for e in found.entries] == [800, 300]
    found = PooledSpectrum(floor=0.2).allocate(menus, 1100)  # flat keeps 800, the rest goes to steep
    assert [e.bits for e in found.entries] == [800, 300]
    with pytest.raises(UsageError, match=r"no group losing more than 0\.2; ask for a ratio of at most 0\.2,"):
        PooledSpectrum(ceiling=0.2).allocate(menus, 1100)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.floats(0.15, 1), st.sampled_from([0.0, 0.1]), st.sampled_from([0.9, 0.85]))
def test_pooled_fits_from_below_and_does_not_depend_on_order(seed, kept, floor, ceiling):
    menus = like_a_model(15, 30, seed)
    allocator = PooledSpectrum(floor, ceiling)
    capacity = max(int(kept * sum(m.dense_bits for m in menus)), span(menus)[0])
    try:
        found = allocator.allocate(menus, capacity)
    except UsageError:  # the coarse menus have nothing small enough, and the ceiling forbids the rest
        assert kept < 0.2
        return
    assert found.bits <= capacity
    for menu, entry in zip(menus, found.entries, strict=True):
        smallest = min(e.bits for e in menu.entries)
        assert entry.bits <= (1 - floor) * menu.dense_bits + 1 or entry.bits == smallest
        assert not [e for e in menu.entries if e.bits <= entry.bits and e.cost < entry.cost]
        # Nothing more fits.
        rest = capacity - found.bits
        larger = [e.bits for e in menu.entries if e.cost < entry.cost and e.bits <= (1 - floor) * menu.dense_bits]
        assert not larger or min(larger) > entry.bits + rest
    again = allocator.allocate(menus[::-1], capacity)
    assert again.indices == found.indices[::-1]


def test_pooled_with_fine_menus_uses_the_capacity():
    rng = np.random.default_rng(0)
    menus = [fine(f"g{i}", 10**6 + i, np.exp(-np.arange(50) / rng.uniform(2, 50))) for i in range(30)]
    capacity = int(0.6 * sum(m.dense_bits for m in menus))
    assert 0 <= PooledSpectrum().allocate(menus, capacity).unused < 0.005


def test_pooled_obeys_limits():
    menus = like_a_model(6, 20, 1)
    menus[2] = restrict(menus[2], 0.0, 0.0)
    found = PooledSpectrum().allocate(menus, int(0.7 * sum(m.dense_bits for m in menus)))
    assert found.entries[2].choice == "dense"
    assert found.bits <= found.capacity


def test_pooled_refuses_what_it_cannot_use():
    with pytest.raises(UsageError, match="a: the pooled spectrum needs the singular values"):
        PooledSpectrum().allocate([fine("a", 1000)], 500)
    for values in ([1.0, np.nan], [-1.0, 1.0]):
        with pytest.raises(NumericalError, match="a: singular values"):
            PooledSpectrum().allocate([fine("a", 1000, np.array(values))], 500)
    for limits in [(0.5, 0.4), (-0.1, 0.5), (0.0, 1.1)]:
        with pytest.raises(UsageError, match="expected 0 <= floor <= ceiling <= 1"):
            PooledSpectrum(*limits)


@pytest.mark.parametrize("kept", [0.8, 0.5, 0.3])
def test_the_knapsack_costs_no_more_than_the_others(kept):
    menus = [restrict(m, 0.0, 0.8) for m in like_a_model(40, 40, 9)]
    capacity = int(kept * sum(m.dense_bits for m in menus))
    best = Knapsack().allocate(menus, capacity)
    for other in (EqualRatio(), PooledSpectrum(ceiling=0.8)):
        found = other.allocate(menus, capacity)
        assert found.bits <= capacity
        assert best.cost < found.cost


# --- what is left


@settings(deadline=None)
@given(small_menus, st.floats(0, 1), st.sampled_from([0.0, 0.1]))
def test_what_is_left_is_spent_while_anything_fits(menus, place, enough):
    low, high = span(menus)
    capacity = low + round(place * (high - low))
    chosen = [min(m.entries, key=lambda e: e.bits) for m in menus]
    spent = spend_rest(chosen, [m.entries for m in menus], capacity, enough)
    assert spent.bits == sum(e.bits for e in spent.entries) <= capacity
    assert spent.unused == pytest.approx(1 - spent.bits / capacity)
    for menu, before, after in zip(menus, chosen, spent.entries, strict=True):
        assert after == before or (after in menu.entries and after.cost < before.cost and after.bits > before.bits)
        room = after.bits + capacity - spent.bits
        better = [e for e in menu.entries if after.bits < e.bits <= room and e.cost < after.cost]
        assert not better or capacity - spent.bits <= enough * capacity


def test_the_largest_fall_of_cost_per_bit_comes_first_and_enough_is_enough():
    chosen = [Entry(100, 10.0), Entry(100, 10.0)]
    finer = [[Entry(110, 9.0), Entry(120, 4.0)], [Entry(110, 8.0)]]
    assert spend_rest(chosen, finer, 220).entries == (finer[0][1], chosen[1])
    assert spend_rest(chosen, finer, 215).entries == (chosen[0], finer[1][0])
    assert spend_rest(chosen, finer, 230).entries == (finer[0][1], finer[1][0])
    assert spend_rest(chosen, finer, 230, enough=0.05).entries == (finer[0][1], chosen[1])


def test_functions_are_asked_for_what_still_fits():
    asked = []

    def atoms(entry, room):
        asked.append(room)
        growth = room // 7 * 7
        return Entry(entry.bits + growth, entry.cost * 0.99**growth) if growth else None

    spent = spend_rest([Entry(100, 1.0), Entry(100, 50.0), Entry(5, 3.0)], [atoms, atoms, []], 240)
    assert [e.bits for e in spent.entries] == [100, 135, 5]
    assert spent.bits == 240
    assert max(asked) == 35
    spent = spend_rest([Entry(100, 1.0)], [atoms], 104)
    assert spent.entries == (Entry(100, 1.0),)
    assert spent.unused == pytest.approx(4 / 104)


def test_an_entry_that_does_not_fit_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="at most 104 bits, the finer entry has 105"):
        spend_rest([Entry(100, 1.0)], [lambda entry, room: Entry(105, 0.5)], 104)
    with pytest.raises(ValueError, match="take 100 bits of 99"):
        spend_rest([Entry(100, 1.0)], [[]], 99)
