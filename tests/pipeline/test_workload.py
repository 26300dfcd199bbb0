import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cospadi.allocation import profile
from cospadi.allocation.choices import Factors, Quantized
from cospadi.allocation.profile import Families
from cospadi.pipeline import workload as costs
from cospadi.solvers.htp import HTP
from cospadi.solvers.orthogonal import Orthogonal

FAMILIES = Families(quantized=("int8", "int4g64"))
CHOICES = {
    "input": Factors(64, 32),
    "rounded": Factors(64, 32, "input", "int8", "int8"),
    "output": Factors(64, 32, "output"),
    "sparse": Factors(64, 32, "input", "bfloat16", "none"),
    "quantized": Quantized(("int8",)),
}
widths = st.lists(st.integers(1, 20_000), min_size=1, max_size=3)


def of_size(choice, factor):
    if isinstance(choice, Quantized):
        return choice
    return replace(choice, n_atoms=choice.n_atoms * factor, n_nonzero=choice.n_nonzero * factor)


@given(st.integers(1, 20_000), widths, st.sampled_from(sorted(CHOICES)), st.integers(1, 3))
def test_every_unit_costs_something_finite_and_larger_ones_cost_more(d, out_features, name, n_inputs):
    cost = costs.solving(CHOICES[name], d, out_features, HTP(), n_inputs)
    assert 0 < cost < math.inf
    # Of the same proportions: a wide matrix is decomposed in another way than a tall one, and the formulas only meet.
    assert costs.solving(CHOICES[name], 2 * d, [*out_features, *out_features], HTP(), n_inputs) > cost


@given(st.integers(1, 5000), widths)
def test_profiles_and_samples_of_larger_groups_cost_more(d, out_features):
    for cost in (costs.profiling, lambda *sizes: costs.correcting(*sizes, HTP())):
        assert 0 < cost(d, out_features, FAMILIES) < math.inf
        assert cost(d, [*out_features, 64], replace(FAMILIES, sides=("input",))) > cost(
            d, out_features, replace(FAMILIES, sides=("input",))
        )


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_twice_the_size_of_everything_costs_near_eight_times(name):
    """At large sizes all work is of the third order, but for the loops of rounding weights."""
    large, double = (
        costs.solving(of_size(CHOICES[name], 64 * factor), 4096 * factor, [4096 * factor], HTP()) for factor in (1, 2)
    )
    assert 7 < double / large < 8.2 if name != "quantized" else 5 < double / large < 8


def test_what_takes_more_steps_costs_more():
    base = costs.solving(CHOICES["input"], 512, [512], HTP())
    assert costs.solving(CHOICES["input"], 512, [512], HTP(n_iter=30)) > base
    assert costs.solving(CHOICES["input"], 512, [512], HTP(cg_steps=4)) > base
    assert costs.solving(CHOICES["rounded"], 512, [512], HTP()) > base
    assert costs.solving(CHOICES["input"], 512, [256, 256], HTP(), n_inputs=2) > base
    assert costs.solving(CHOICES["input"], 512, [512], Orthogonal()) > 0


def test_a_profile_costs_what_it_holds():
    nothing = Families(dtypes=(), quantized=())
    parts = [
        replace(nothing, dtypes=FAMILIES.dtypes, learned=False),
        replace(nothing, dtypes=FAMILIES.dtypes, identity=False, sides=("input",)),
        replace(nothing, dtypes=FAMILIES.dtypes, identity=False, sides=("output",)),
        replace(nothing, quantized=("int8",)),
    ]
    sizes = (1024, [512])
    whole = replace(nothing, dtypes=FAMILIES.dtypes, quantized=("int8",))
    bare = costs.profiling(*sizes, nothing)
    assert all(costs.profiling(*sizes, part) > bare for part in parts)
    added = sum(costs.profiling(*sizes, part) - bare for part in parts)
    assert costs.profiling(*sizes, whole) == pytest.approx(bare + added)
    assert costs.profiling(*sizes, whole, spectrum=True) > costs.profiling(*sizes, whole)


def test_the_sizes_of_profiles_are_those_of_profiling():
    assert costs._OUTPUT_SHARES == profile._OUTPUT_SHARES
