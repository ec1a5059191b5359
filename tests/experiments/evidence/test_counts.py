"""Intervals of parts and medians against closed forms, tables and coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.evidence.counts import draws, interval, median, part, ratio


@pytest.mark.parametrize(("count", "num"), [(0, 7), (3, 7), (7, 7), (40, 125), (1, 1)])
def test_the_interval_of_wilson(count, num):
    """E. B. Wilson (1927): the values p at which the observed part is 1.96 standard errors off."""
    found = part([True] * count + [False] * (num - count))
    z, p = stats.norm.ppf(0.975), count / num
    center = (p + z**2 / (2 * num)) / (1 + z**2 / num)
    margin = z / (1 + z**2 / num) * math.sqrt(p * (1 - p) / num + z**2 / (4 * num**2))
    np.testing.assert_allclose(found.interval, (center - margin, center + margin), atol=1e-12)
    assert found.value == p and str(found).startswith(f"{count} of {num} runs (")


def test_most():
    assert part([True] * 20).most is True
    assert part([False] * 20).most is False
    assert part([True, False] * 10).most is None
    nothing = part([])
    assert nothing.most is None and nothing.interval == (0.0, 1.0) and math.isnan(nothing.value)


# Ranks of the 95 % interval of a median, from the tables of textbooks.
@pytest.mark.parametrize(
    ("num", "low", "high"), [(6, 1, 6), (8, 1, 8), (10, 2, 9), (15, 4, 12), (20, 6, 15), (25, 8, 18)]
)
def test_the_interval_of_a_median_by_ranks(num, low, high):
    values = np.random.default_rng(num).permutation(np.arange(1.0, num + 1))
    found = median(values)
    assert (found.low, found.high) == (low, high) and found.value == (num + 1) / 2


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    """By enumeration: the median lies between order statistics j and n + 1 - j unless fewer than j lie on one side."""
    for num in range(6, 40):
        rank = int(median(np.arange(1.0, num + 1)).low)
        outside = [2 * sum(math.comb(num, k) for k in range(j)) / 2**num for j in (rank, rank + 1)]
        assert outside[0] <= 0.05 < outside[1]


def test_few_values_have_no_interval():
    assert f"{median([1.0, 3.0]):steps}" == "2 steps (too few runs for an interval)"
    assert f"{median(np.arange(6.0))}" == "2.5 (0 to 5)"
    assert f"{median([0, 1, 1, 1, 1, 2]):steps}" == "1 step (0 to 2)"
    assert math.isnan(median([]).value)


def test_cells_are_drawn_whole_and_as_many_as_there_are():
    cells = ["a", "b", "a", "c", "c", "c"]
    drawn = draws(cells, generator=np.random.default_rng(0))
    assert (drawn[:, 0] == drawn[:, 2]).all() and (drawn[:, 3] == drawn[:, 5]).all()
    assert (drawn[:, [0, 1, 3]].sum(axis=1) == 3).all()
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=0.06)
    np.testing.assert_array_equal(drawn, draws(cells, generator=np.random.default_rng(0)))


def test_resampled_parts_and_medians_are_those_of_plain_loops():
    generator = np.random.default_rng(1)
    cells, values = np.repeat(np.arange(9), 4), generator.normal(size=36) + np.repeat(generator.normal(size=9), 4)
    drawn = draws(cells, generator=generator)
    repeated = [np.repeat(values, times.astype(int)) for times in drawn]
    low, high = np.percentile([np.median(sample) for sample in repeated], [2.5, 97.5])
    found = median(values, drawn)
    plain = median(values)
    assert (found.low, found.high) == (min(low, plain.low), max(high, plain.high))
    ends = np.percentile([(sample > 0).mean() for sample in repeated], [2.5, 97.5])
    np.testing.assert_allclose(part(values > 0, drawn).resampled, ends)


def test_an_interval_over_cells_holds_the_part_more_often_than_one_over_runs():
    """Cells whose runs all agree: 15 independent cells of 6, where Wilson's interval counts 90 runs."""
    generator, hits = np.random.default_rng(2), {"cells": 0, "runs": 0}
    cells = np.repeat(np.arange(15), 6)
    for _ in range(200):
        which = np.repeat(generator.random(15) < 0.4, 6)
        for name, drawn in (("cells", draws(cells, generator=generator)), ("runs", None)):
            low, high = part(which, drawn).interval
            hits[name] += low <= 0.4 <= high
    assert hits["cells"] > 0.88 * 200 and hits["runs"] < 0.7 * 200


def test_runs_that_all_agree_keep_the_interval_of_wilson():
    drawn = draws(np.arange(20) // 5, generator=np.random.default_rng(0))
    assert part([True] * 20, drawn).interval == pytest.approx(part([True] * 20).interval)
    assert part([], drawn[:, :0]).interval == (0.0, 1.0)
    assert part([True, False] * 10).above(0.2) is True and part([True, False] * 10).above(0.8) is False


def test_resamples_without_a_value_say_nothing():
    assert interval(np.array([math.nan, math.nan])) == (-math.inf, math.inf)
    assert interval(ratio(np.array([0.0, 1.0, 1.0]), np.array([0.0, 2.0, 2.0]))) == (0.5, 0.5)
