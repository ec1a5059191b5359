"""A budget is kept by the clock on the wall, on which also counts what a record costs after it is over."""

import numpy as np
import pytest

from gradscope.monitor.schedule import Schedule


class Clock:
    """Stands still until it is moved."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def trained(steps, *, own=0.2, after=0.1, look=0.0, budget=0.03, noise=0.1, every=2, seed=0):
    """Seconds of training by itself, seconds in all, and the records of a run of so many steps of about a second."""
    clock, generator = Clock(), np.random.default_rng(seed)
    schedule = Schedule({"statistics": every}, budget, clock)
    alone, records, recorded = 0.0, 0, False
    for step in range(steps):
        # Now and then a step takes many times as long: a test set is evaluated, a checkpoint written.
        seconds = generator.uniform(1 - noise, 1 + noise) + 20 * (generator.random() < 0.01)
        alone += seconds
        clock.now += seconds + after * recorded
        schedule.arrives()
        clock.now += look
        schedule.checked()
        kind = schedule.due(step)
        recorded = kind is not None and schedule.allows(kind, step)
        if recorded:
            clock.now += own
            schedule.took(kind, own, step)
            records += 1
        schedule.leaves(kind if recorded else None)
    return alone, clock.now, records, schedule


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("after", "look"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.005)])
def test_the_budget_is_kept_by_the_wall_clock(after, look, seed):
    alone, total, records, schedule = trained(4000, after=after, look=look, seed=seed)
    # The median of 200 differences has a standard error of 0.0076 s for this noise, that is 0.0008 of the time.
    assert total / alone == pytest.approx(1.03, abs=0.0025)
    expected = alone * (0.03 - look) / (0.2 + after)
    assert records == pytest.approx(expected, rel=0.12) and schedule.skipped == 2000 - records
    assert schedule.overhead == pytest.approx(total / alone - 1, abs=0.0025)


def test_a_step_that_is_shorter_after_a_record_earns_nothing():
    alone, total, _, _ = trained(4000, after=-0.1)
    assert total / alone <= 1.03


def test_what_is_not_known_yet_is_not_counted():
    schedule = Schedule({"statistics": 1}, None, clock := Clock())
    for step in range(3):
        clock.now += 1.0
        schedule.arrives()
        schedule.checked()
        clock.now += 0.25
        schedule.took("statistics", 0.25, step)
        schedule.leaves("statistics")
    assert schedule.spent == 0.75 and schedule.overhead == 0.25


def places(num, every, total_steps=None, budget=1e-9):
    """The steps with a record in a run of ``num`` scheduled records, if each takes as long as a thousand steps."""
    clock, taken = Clock(), []
    schedule = Schedule({"every": every}, budget, clock, total_steps)
    for step in range(num * every):
        clock.now += 1.0
        schedule.arrives()
        schedule.checked()
        kind = schedule.due(step)
        if kind is not None and schedule.allows(kind, step):
            clock.now += 1000.0
            schedule.took(kind, 1000.0, step)
            taken.append(step)
        schedule.leaves(kind)
    assert schedule.taken == len(taken) and schedule.skipped == num - len(taken)
    return taken


@pytest.mark.parametrize("every", [1, 7])
def test_any_run_keeps_twenty_records_spread_over_its_steps(every):
    assert places(20, every) == [every * place for place in range(20)]
    long = places(1000, every)
    assert long[:20] == [every * place for place in range(20)] and len(long) < 50
    assert all(
        after - before <= after / 6 + every for before, after in zip(long, [*long[1:], 1000 * every], strict=True)
    )


@pytest.mark.parametrize("every", [1, 7])
def test_a_run_of_known_length_keeps_twenty_records_at_equal_distances(every):
    assert places(1000, every, 1000 * every) == [every * 50 * place for place in range(20)]
    assert len(places(5, every, 5 * every)) == 5
    for num in (20, 33, 39, 40, 59, 81):
        assert 20 <= len(places(num, every, num * every)) <= 39


def test_powers_of_two_are_not_thinned():
    schedule = Schedule({"every": "log"}, 1e-9, Clock())
    for step in (0, 1, 2, 4, 1024):
        assert schedule.allows("every", step)
        schedule.took("every", 1e6, step)
