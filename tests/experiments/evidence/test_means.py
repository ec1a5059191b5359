"""Means with their intervals, comparisons with a bound, and how both are printed."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from scipy import stats

from experiments.evidence import counts
from experiments.evidence.means import Mean, all_of, errorbars, geometric_mean, mean
from experiments.evidence.words import listed, measured, table, told


def test_a_mean_has_the_interval_of_student(monkeypatch):
    values = [1.0, 2.0, 4.0]
    found = mean(values)
    low, high = stats.t.interval(0.95, 2, loc=7 / 3, scale=stats.sem(values))
    assert (found.value, found.low, found.high, found.num) == pytest.approx((7 / 3, low, high, 3))
    wider = mean(values, comparisons=4)
    low, high = stats.t.interval(1 - 0.05 / 4, 2, loc=7 / 3, scale=stats.sem(values))
    assert (wider.value, wider.low, wider.high) == pytest.approx((7 / 3, low, high))
    assert geometric_mean([1.0, 10.0], comparisons=4).low < geometric_mean([1.0, 10.0]).low
    logarithmic = geometric_mean([1.0, 10.0, 100.0])
    assert logarithmic.value == pytest.approx(10.0)
    assert math.log10(logarithmic.high) - 1 == pytest.approx(stats.t.ppf(0.975, 2) / math.sqrt(3))
    with pytest.raises(ValueError, match=r"A mean needs numbers, got \[nan\]"):
        mean([math.nan])
    with pytest.raises(ValueError, match=r"needs positive numbers, got \[0.0, 1.0\]"):
        geometric_mean([0.0, 1.0])


@pytest.mark.parametrize(("low", "high", "below", "above", "within"), [
    (0.2, 0.4, True, False, False),
    (1.5, 1.9, False, True, False),
    (0.8, 1.2, None, None, None),
    (0.95, 1.05, None, None, True),
])  # fmt: skip
def test_a_comparison_needs_the_whole_interval(low, high, below, above, within):
    found = Mean((low + high) / 2, low, high, 5)
    assert (found.below(1), found.above(1), found.within(1, 0.1)) == (below, above, within)
    assert found.between(0.9, 1.1) is within


def test_a_single_seed_decides_nothing():
    assert mean([5.0]).above(0) is None and mean([5.0]).within(5, 1) is None
    assert all_of(True, True) is True and all_of(None, False) is False and all_of(None, True) is None


def test_a_mean_is_printed_with_the_digits_of_its_interval():
    assert f"{mean([1.5])}" == "1.5 (one seed)"
    assert f"{Mean(1, 0.99996, 1.00004, 3)}" == "1.000000 (0.999960 to 1.000040)"
    assert f"{Mean(0.0001, -0.1, 0.2, 3):+}" == "+0.00 (-0.10 to +0.20)"
    assert str(mean([1.5, 1.5])) == "1.5 (no spread)"
    assert f"{counts.median([4.0] * 9)}" == "4 (no spread)"
    with pytest.raises(ValueError, match=r"decides its digits; .* only, got '\.2f'"):
        f"{mean([1.0, 2.0]):.2f}"


def test_printed_ends_are_apart_and_near_the_true_ends():
    rng = np.random.default_rng(0)
    for center, exponent in zip(rng.normal(size=2000), rng.uniform(-9, 9, size=2000), strict=True):
        width = 10 ** rng.uniform(-5, 1) * abs(center)
        true = np.array([center, center - width * rng.uniform(), center + width]) * 10**exponent
        words = measured(*true)
        value, low, high = map(float, words.strip(")").replace(" (", " to ").split(" to "))
        assert low < high, words
        assert np.abs(np.array([value, low, high]) - true).max() <= 0.051 * (true[2] - true[1]), (words, true)


def test_names_and_numbers_are_listed():
    assert listed("abc") == "a, b and c" and listed([1, 2.5], "or") == "1 or 2.5" and listed("a") == "a"
    assert listed([]) == "none"
    assert table(["a", "b"], [[1, "|x|"]]) == "| a | b |\n| --- | --- |\n| 1 | \\|x\\| |"
    verdicts = {("selu", "wide"): True, ("selu", "deep"): True, ("tanh", ""): None}
    assert told(verdicts, "Yes: {}.", "No: {}.", "Open: {}.") == "Yes: selu (wide, deep). Open: tanh."


def test_error_bars_reach_to_the_ends_of_the_intervals():
    means = [mean([1.0, 2.0, 4.0]), geometric_mean([1.0, 10.0])]
    figure, (upright, flat) = plt.subplots(1, 2)
    errorbars(upright, [0, 1], means, fmt="o")
    errorbars(flat, [0, 1], means, horizontal=True, fmt="o")
    for ax, axis in ((upright, 1), (flat, 0)):
        (bars,) = (container.lines[2][0] for container in ax.containers)
        ends = np.array(bars.get_segments())[:, :, axis]
        np.testing.assert_allclose(ends, [[one.low, one.high] for one in means])
    plt.close(figure)
