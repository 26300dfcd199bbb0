import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cospadi.allocation.curves import ErrorCurve
from cospadi.errors import NumericalError
from tests.allocation.problems import costs

points = st.lists(st.tuples(st.integers(1, 10**12), costs), min_size=1, max_size=8)


@settings(deadline=None, max_examples=200)
@given(points)
def test_a_curve_never_rises_and_stays_between_its_points(found):
    curve = ErrorCurve.through(*zip(*found, strict=True))
    at = np.unique(np.concatenate([np.linspace(curve.bits[0], curve.bits[-1], 101), curve.bits]))
    values = curve(at)
    assert np.isfinite(values).all()
    assert (np.diff(values) <= 0).all()
    right = np.searchsorted(curve.bits, at).clip(0, len(curve.bits) - 1)
    left = np.searchsorted(curve.bits, at, side="right").clip(1) - 1
    assert (values <= curve.falling[left]).all()
    assert (values >= curve.falling[right]).all()


@settings(deadline=None, max_examples=100)
@given(points)
def test_a_curve_passes_through_its_falling_points(found):
    curve = ErrorCurve.through(*zip(*found, strict=True))
    for bits, value in zip(curve.bits, curve(curve.bits), strict=True):
        assert value == min(cost for other, cost in found if other <= bits)


@settings(deadline=None, max_examples=50)
@given(points, st.randoms(use_true_random=False), st.sampled_from([2.0**-40, 4.0]))
def test_order_and_unit_of_the_points_do_not_matter(found, random, unit):
    shuffled = list(found)
    random.shuffle(shuffled)
    one = ErrorCurve.through(*zip(*found, strict=True))
    other = ErrorCurve.through([b for b, _ in shuffled], [unit * c for _, c in shuffled])
    at = np.linspace(one.bits[0], one.bits[-1], 33)
    assert other(at) == pytest.approx(unit * one(at), rel=1e-9, abs=0)


def test_exponentials_are_met_exactly_and_their_sums_closely():
    bits = np.linspace(1e6, 9e6, 7)
    at = np.linspace(1e6, 9e6, 57)
    exact = ErrorCurve.through(bits, 3 * np.exp(-bits / 1e6))
    assert exact(at) == pytest.approx(3 * np.exp(-at / 1e6), rel=1e-9)
    assert exact.leave_one_out() == pytest.approx(np.zeros(5), abs=1e-9)

    def two_exponentials(b):
        return np.exp(-b / 1e6) + 0.02 * np.exp(-b / 5e6)

    close = ErrorCurve.through(bits, two_exponentials(bits))
    errors = np.abs(close(at) / two_exponentials(at) - 1)
    assert errors.max() < 0.04
    assert errors.max() < np.abs(close.leave_one_out()).max() < 0.3


def test_leaving_one_out_finds_the_point_that_does_not_belong():
    bits = np.linspace(1e6, 9e6, 9)
    values = np.exp(-bits / 2e6)
    values[4] *= 1.3
    errors = ErrorCurve.through(bits, values).leave_one_out()
    assert len(errors) == 7
    assert np.abs(errors).argmax() == 3  # the fifth point; the first has no error
    assert errors[3] == pytest.approx(1 / 1.3 - 1, rel=0.1)


def test_zero_and_equal_costs():
    line = ErrorCurve.through([10, 20, 30, 40], [4.0, 2.0, 0.0, 0.0])
    assert line([20, 25, 30, 35, 40]) == pytest.approx([2, 1, 0, 0, 0])
    assert 2 < line(15) < 4
    assert line.leave_one_out() == pytest.approx([4 * 0.5 / 2 - 1, np.inf])
    assert ErrorCurve.through([10, 20, 30], [0.0, 0.0, 0.0]).leave_one_out() == pytest.approx([0.0])
    flat = ErrorCurve.through([10, 20, 30], [3.0, 3.0, 3.0])
    assert (flat(np.linspace(10, 30, 21)) == 3.0).all()
    bump = ErrorCurve.through([10, 20, 30], [3.0, 5.0, 1.0])
    assert bump([10, 20, 30]) == pytest.approx([3, 3, 1])
    assert bump.leave_one_out()[0] == pytest.approx(3**0.5 / 5 - 1)  # beside what was measured
    again = ErrorCurve.through([10, 10, 20], [3.0, 2.0, 1.0])
    assert again(10) == 2


def test_nothing_is_said_outside_the_points():
    curve = ErrorCurve.through([10, 20], [2.0, 1.0])
    for bits in (9.999, 20.001, [15, 21], float("nan")):
        with pytest.raises(ValueError, match="known from 10 to 20"):
            curve(bits)
    assert ErrorCurve.through([10], [2.0])(10) == 2
    assert ErrorCurve.through([10], [2.0]).leave_one_out().size == 0
    with pytest.raises(ValueError, match="known from 10 to 10"):
        ErrorCurve.through([10], [2.0])(11)


def test_points_that_make_no_sense():
    with pytest.raises(ValueError, match="0 bits and 0 costs"):
        ErrorCurve.through([], [])
    with pytest.raises(ValueError, match="2 bits and 1 costs"):
        ErrorCurve.through([1, 2], [1.0])
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(NumericalError, match="expected finite, not negative"):
            ErrorCurve.through([1, 2], [1.0, cost])
