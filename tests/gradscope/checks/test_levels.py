"""The shared probability of a false alarm: limits, the robust scale, and simulated healthy values."""

import numpy as np
import pytest
from scipy import special, stats

from gradscope.checks.against_theory import _z_length
from gradscope.checks.levels import CHECKS, FALSE_ALARMS, freedom, limit, nearest, scale
from gradscope.checks.reading import read
from gradscope.checks.siblings import _quiet
from gradscope.models import MLP
from tests.helpers import noise, seeded


def test_the_shares_of_all_checks_add_up_to_the_level():
    tests = [4, 30, 200]
    reached = [num * 2 * special.stdtr(7.5, -limit(num, 7.5)) for num in tests]
    assert sum(reached) == pytest.approx(FALSE_ALARMS * len(tests) / CHECKS)
    assert limit(1) == pytest.approx(special.ndtri(1 - FALSE_ALARMS / CHECKS / 2))


@pytest.mark.parametrize("num", [7, 8, 9, 12, 13, 24])
def test_healthy_values_keep_the_level_with_the_robust_scale(num):
    values = np.random.default_rng(num).normal(size=(4000, num))
    z = [np.abs(row - np.median(row)).max() / scale(row) for row in values]
    alarms, level = int((np.array(z) > limit(num, freedom(num))).sum()), FALSE_ALARMS / CHECKS
    assert stats.binomtest(alarms, len(values), level, alternative="greater").pvalue > 0.01


def test_half_of_the_values_may_be_wrong():
    values = np.random.default_rng(0).normal(size=41)
    wrong = np.where(np.arange(41) < 19, 1e6 * (1 + np.arange(41)), values)
    assert scale(wrong) < 5


def test_the_nearest_places_by_hand():
    assert nearest(2, 6) == [2, 1, 3, 0, 4, 5]


def test_lengths_of_narrow_layers_are_normal_far_into_the_tail():
    """All samples have one direction, so a mean square over 10 neurons has 10 degrees of freedom."""
    x = noise(1, 10).repeat(4, 1) * (1 + noise(4, 1).abs())
    z = []
    for seed in range(300):
        model = MLP(depth=6, width=10, activation="relu", generator=seeded(seed)).double()
        reading = read(model, x)
        assert reading.layers[0].overlap == pytest.approx(1)
        z += list(_z_length(reading)[:1])
    ratio = stats.norm.cdf(z)
    assert stats.kstest(ratio, "uniform").pvalue > 0.01


def test_no_quiet_feature_among_few_does_not_prove_that_there_are_none():
    y = noise(8, 16)
    share, error = _quiet(y, -1)
    assert share == 0 and error == pytest.approx(np.sqrt(17 / 18 / 18 / 16))
