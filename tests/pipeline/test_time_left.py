import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cospadi.events import Calibrated, Corrected, GroupFinished, Planned, Profiled, Retried, Written
from cospadi.pipeline.time_left import TimeLeft

works = st.lists(st.floats(0.01, 1000), min_size=2, max_size=30)
speeds = st.floats(0.01, 100)


def steps(sizes, resumed=0):
    """The events of a stage whose units cost these sizes."""
    total = sum(sizes)
    for index in range(len(sizes)):
        done = sum(sizes[: index + 1])
        yield Profiled(index + 1, len(sizes), index < resumed, work_done=done, work_total=total)


@given(works, speeds)
def test_at_a_uniform_speed_the_time_left_is_exact_from_the_first_unit_on(sizes, speed):
    now, estimate = 5.0, TimeLeft(0.0)
    estimate.observe(Profiled(0, len(sizes), work_done=0, work_total=sum(sizes)), now)
    assert estimate.left(now) is None
    end = now + sum(sizes) * speed
    for size, event in zip(sizes, steps(sizes), strict=True):
        now += size * speed
        estimate.observe(event, now)
        if event.done < event.total:
            assert estimate.left(now) == pytest.approx(end - now, rel=1e-6, abs=1e-6)
    assert estimate.left(now) is None


@given(works, speeds, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_at_a_uniform_speed_it_only_falls_and_never_below_zero(sizes, speed, moments):
    """Also when it is asked for between events."""
    estimate, last = TimeLeft(0.0), float("inf")
    now = 0.0
    for size, event in zip(sizes, list(steps(sizes))[:-1], strict=False):
        for moment in sorted(moments):
            left = estimate.left(now + moment * size * speed)
            if left is not None:
                assert 0 <= left <= last * (1 + 1e-6) + 1e-6
                last = left
        now += size * speed
        estimate.observe(event, now)


@given(works, speeds, st.floats(0, 50), st.data())
def test_what_was_taken_over_counts_as_done_and_not_as_speed(sizes, speed, reading, data):
    taken = data.draw(st.integers(0, len(sizes) - 2))
    now, estimate = 0.0, TimeLeft(0.0)
    for index, event in enumerate(steps(sizes, resumed=taken)):
        now += reading if index < taken else sizes[index] * speed
        estimate.observe(event, now)
        if index < taken:
            assert estimate.left(now) is None
        elif event.done < event.total:
            assert estimate.left(now) == pytest.approx(sum(sizes[index + 1 :]) * speed, rel=1e-6, abs=1e-6)


@given(st.integers(2, 8), st.integers(3, 20), speeds)
def test_with_several_workers_the_speed_is_that_of_all(workers, rounds, speed):
    estimate, n = TimeLeft(0.0), workers * rounds
    for done in range(1, n + 1):
        now = -(-done // workers) * speed
        estimate.observe(Profiled(done, n), now)
        if done % workers == 0 and done < n:
            assert estimate.left(now) == pytest.approx((n - done) / workers * speed)


def test_large_units_that_come_last_are_foreseen():
    estimate = TimeLeft(0.0)
    estimate.observe(Profiled(9, 10, work_done=9, work_total=109), 9.0)
    assert estimate.left(9.0) == pytest.approx(100)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.floats(0.1, 10), st.floats(0.1, 10))
def test_stages_that_take_turns_add_up(turns, slow, fast):
    """Blocks are calibrated and solved in turn: each second counts for the stage of the event that ends it."""
    assume(True in turns and False in turns)
    now, estimate, counts = 0.0, TimeLeft(0.0), {True: 0, False: 0}
    for turn in turns:
        counts[turn] += 1
        now += slow if turn else fast
        done, total = counts[turn], 40
        estimate.observe(Calibrated(done, total, "blocks") if turn else Corrected(done, total), now)
    assert estimate.left(now) == pytest.approx((40 - counts[True]) * slow + (40 - counts[False]) * fast)


def test_a_new_run_of_a_stage_starts_afresh_and_other_events_only_pass_time():
    estimate = TimeLeft(0.0)
    estimate.observe(Profiled(1, 2), 100.0)
    estimate.observe(Profiled(2, 2), 200.0)
    estimate.observe(Planned(1, 4, 4, 0, "htp", ""), 300.0)
    row = {"name": "a"}
    estimate.observe(GroupFinished(row, 1, 4, 1.0, False), 301.0)
    assert estimate.left(301.0) == pytest.approx(3)
    estimate.observe(Retried("b", "its worker died"), 301.5)
    estimate.observe(GroupFinished(row, 2, 4, 1.0, False), 302.0)
    assert estimate.left(302.0) == pytest.approx(2)
    estimate.observe(Profiled(0, 2), 310.0)
    estimate.observe(Profiled(1, 2), 311.0)
    assert estimate.left(311.0) == pytest.approx(1 + 2)
    estimate.observe(Written("out"), 312.0)


def test_a_stage_that_never_got_going_hides_no_other():
    """What a cache knows is begun and not gone through."""
    estimate = TimeLeft(0.0)
    estimate.observe(Calibrated(0, 8, "windows"), 0.0)
    estimate.observe(Profiled(1, 3), 2.0)
    assert estimate.left(2.0) == pytest.approx(4)
