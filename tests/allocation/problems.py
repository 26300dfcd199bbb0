"""Allocation problems for the tests: small ones that can be enumerated, and large ones like a model's."""

import itertools

import numpy as np
from hypothesis import strategies as st

from cospadi.allocation.menu import Entry, Menu

costs = st.one_of(
    st.sampled_from([0.0, 1.0, 2.0, 1e-12, 1e12]),
    st.floats(1e-12, 1.0),
    st.builds(lambda mantissa, power: mantissa * 10.0**power, st.floats(1, 10), st.integers(-12, 6)),
)


def entries(bits):
    return st.lists(st.builds(Entry, bits, costs), min_size=1, max_size=4).map(tuple)


def menus_of(bits, max_size=5):
    """Up to ``max_size`` menus of up to four entries."""
    return st.lists(entries(bits), min_size=1, max_size=max_size).map(
        lambda many: [Menu(f"g{i}", max(e.bits for e in one), one) for i, one in enumerate(many)]
    )


bit_sizes = st.one_of(st.integers(1, 40), st.integers(1, 10**12), st.sampled_from([10**12, 10**12 - 1]))
small_menus = st.one_of(menus_of(st.integers(1, 40)), menus_of(bit_sizes))


def span(menus):
    """The smallest and the largest total."""
    bits = [[e.bits for e in menu.entries] for menu in menus]
    return sum(map(min, bits)), sum(map(max, bits))


def cheapest(menus, capacity):
    """Cost of the best choice by trying all."""
    return min(
        sum(e.cost for e in chosen)
        for chosen in itertools.product(*(menu.entries for menu in menus))
        if sum(e.bits for e in chosen) <= capacity
    )


def dynamic_programme(menus, capacity):
    """Cost of the best choice by dynamic programming over the bits."""
    best = np.zeros(capacity + 1)
    for menu in menus:
        following = np.full(capacity + 1, np.inf)
        for entry in menu.entries:
            if entry.bits <= capacity:
                shifted = best[: capacity + 1 - entry.bits] + entry.cost
                following[entry.bits :] = np.minimum(following[entry.bits :], shifted)
        best = following
    return best[capacity]


def like_a_model(n_menus, n_entries, seed, decades=8):
    """Menus with six families of exponentially falling curves and sensitivities over ``decades`` powers of ten."""
    rng = np.random.default_rng(seed)
    menus = []
    for i in range(n_menus):
        dense = 16 * int(rng.choice([576 * 576, 576 * 1536 * 2, 576 * 960, 1536 * 576]))
        sensitivity = 10 ** rng.uniform(-decades, 0)
        found = [Entry(dense, 0.0, "dense")]
        families = [(rng.uniform(3, 9), rng.uniform(0.5, 2)) for _ in range(6)]
        for j in range(n_entries - 1):
            decay, start = families[j % 6]
            kept = rng.uniform(0.1, 0.95)
            found.append(Entry(int(dense * kept), sensitivity * start * np.exp(-decay * kept), (j % 6, kept)))
        spectrum = np.exp(-np.arange(64) / rng.uniform(3, 60))
        menus.append(Menu(f"group{i}", dense, tuple(found), spectrum))
    return menus
