"""Intervals of parts and medians against closed forms, tables and coverage."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.counts import median, part


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
    assert format(median([1.0, 3.0]), "") == "2 (too few for an interval)"
    assert format(median(np.arange(6.0)), "") == "2.5 (0 to 5)"
    assert math.isnan(median([]).value)
