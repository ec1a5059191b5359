"""Rates, intervals and verdicts on curves whose answer is known."""

import math

import numpy as np
import pytest

from gradscope.coefficients.growth import fit_growth

DEPTH = np.arange(50, -1, -1)
LN10 = math.log(10)


@pytest.mark.parametrize(
    ("rate", "verdict"),
    [(1.5, "exploding"), (1.03, "exploding"), (0.9, "vanishing"), (1.0, "stable"), (1.01, "stable")],
)
def test_an_exact_exponential(rate, verdict):
    growth = fit_growth(math.log10(3) + DEPTH * math.log10(rate), DEPTH)
    assert growth.rate == pytest.approx(rate, rel=1e-12)
    assert growth.intercept == pytest.approx(3, rel=1e-9)
    assert growth.verdict == verdict
    assert growth.straight
    assert growth.rate_low == pytest.approx(rate, rel=1e-9)


def test_order_of_the_layers_does_not_matter():
    y = np.random.default_rng(0).normal(size=51).cumsum()
    order = np.random.default_rng(1).permutation(51)
    assert fit_growth(y, DEPTH) == fit_growth(y[order], DEPTH[order])


def test_a_power_law_is_not_exploding():
    growth = fit_growth(3 * np.log10(1 + DEPTH), DEPTH)
    assert not growth.straight
    assert growth.verdict == "irregular"


def test_a_saturating_network_is_not_exploding():
    # Growth near the input that has ended long before the target.
    y = np.where(DEPTH > 40, (DEPTH - 40) * 0.2, 0.0)
    assert fit_growth(y, DEPTH).verdict != "exploding"


def walk(rng, rate, spread, seeds=1):
    steps = rng.normal(math.log10(rate), spread / LN10, size=(seeds, 50))
    return np.concatenate([np.zeros((seeds, 1)), steps.cumsum(axis=1)], axis=1)[:, ::-1]


@pytest.mark.parametrize("seeds", [1, 2, 8])
def test_the_interval_covers_the_rate_of_a_random_walk(seeds):
    # log GSC of a random network is a sum of independent increments; 1,000 repetitions know 95 % to 0.7 %, and the
    # bounds lie four times as far away.
    rng, hits = np.random.default_rng(seeds), 0
    for _ in range(1000):
        growth = fit_growth(walk(rng, 1.2, 0.1, seeds), DEPTH)
        hits += growth.rate_low <= 1.2 <= growth.rate_high
    assert 0.922 <= hits / 1000 <= 0.978


def test_seeds_are_averaged_in_the_logarithm():
    y = np.stack([DEPTH * 0.1, DEPTH * 0.2])
    growth = fit_growth(y, DEPTH)
    assert growth.rate == pytest.approx(10**0.15)
    slope_error = LN10 * 0.05  # half the difference of two slopes
    assert math.log(growth.rate_high / growth.rate) == pytest.approx(12.7062 * slope_error, rel=1e-4)


def test_text():
    text = str(fit_growth(DEPTH * math.log10(1.5), DEPTH))
    assert text.startswith("rate 1.5000 (95 % interval 1.5000 to 1.5000) ") and text.endswith("exploding")


def test_layers_of_one_unit_share_a_depth():
    with pytest.raises(ValueError, match="got 3, 4"):
        fit_growth(np.arange(9.0), np.array([4, 4, 4, 4, 3, 3, 3, 3, 0]))


def test_errors():
    with pytest.raises(ValueError, match="at least 6 layers besides the target, got 4"):
        fit_growth(np.zeros(5), np.arange(5))
    y = DEPTH * 0.1
    y[DEPTH == 7] = -math.inf
    with pytest.raises(ValueError, match="zero or not finite 7 layers from the target"):
        fit_growth(y, DEPTH)
    with pytest.raises(ValueError, match=r"shape \(1, 51\), but depth_from_output has 9 entries"):
        fit_growth(y, np.arange(9))
