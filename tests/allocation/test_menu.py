import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.allocation.menu import Entry, Menu, pareto_indices, restrict
from cospadi.errors import NumericalError, UsageError
from tests.allocation.problems import entries, small_menus

MENU = Menu("a", 100, (Entry(100, 0.0, "dense"), Entry(70, 1.0, "x"), Entry(70, 1.0, "y"), Entry(50, 2.0, "z")))


@given(entries(st.integers(1, 9)))
def test_what_pareto_drops_is_dominated_and_what_it_keeps_is_not(found):
    front = [found[i] for i in pareto_indices(Menu("a", 9, found))]
    for one in found:
        assert any(kept.bits <= one.bits and kept.cost <= one.cost for kept in front)
    for left, right in itertools.pairwise(front):
        assert left.bits < right.bits
        assert left.cost > right.cost


def test_of_equal_entries_the_first_stays():
    assert [MENU.entries[i].choice for i in pareto_indices(MENU)] == ["z", "x", "dense"]


@given(small_menus, st.floats(-1, 1), st.floats(0, 1))
def test_limits_keep_what_lies_between_them(menus, one, two):
    low, high = sorted((one, two))
    for menu in menus:
        inside = [e for e in menu.entries if low <= 1 - e.bits / menu.dense_bits <= high]
        almost = [e for e in menu.entries if low - 1e-8 <= menu.removed(e) <= high + 1e-8]
        if not almost:
            with pytest.raises(UsageError, match=menu.name):
                restrict(menu, low, high)
        elif inside:
            kept = restrict(menu, low, high).entries
            assert set(inside) <= set(kept) <= set(almost)


def test_a_limit_that_an_entry_meets_exactly_admits_it():
    for percent in range(1, 100):
        menu = Menu("a", 100, (Entry(100 - percent, 1.0),))
        assert restrict(menu, percent / 100, percent / 100).entries == menu.entries


def test_a_limit_that_no_entry_meets_says_what_there_is():
    assert [e.choice for e in restrict(MENU, 0.0, 0.0).entries] == ["dense"]
    with pytest.raises(UsageError, match=r"a: no way .* removes between 0\.6 and 0\.9 of its bytes"):
        restrict(MENU, 0.6, 0.9)
    for limits in [(0.5, 0.4), (0.0, 1.5), (math.nan, 1.0)]:
        with pytest.raises(UsageError, match="expected low <= high <= 1"):
            restrict(MENU, *limits)


def test_narrowing_keeps_the_spectrum():
    menu = Menu("a", 10, (Entry(10, 0.0), Entry(5, 1.0)), np.ones(3))
    assert restrict(menu, 0.2).spectrum is menu.spectrum


def test_menus_that_make_no_sense_are_refused():
    with pytest.raises(UsageError, match="a: a menu needs entries"):
        Menu("a", 10, ())
    for bits in (0, -1, 2.5):
        with pytest.raises(UsageError, match="positive whole number"):
            Menu("a", 10, (Entry(bits, 0.0),))
    for cost in (math.nan, math.inf, -1e-30):
        with pytest.raises(NumericalError, match="a: predicted cost"):
            Menu("a", 10, (Entry(5, cost),))
