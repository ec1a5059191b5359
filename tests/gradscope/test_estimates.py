"""Values with errors, at any scale, merged in any order."""

import math
import statistics

import numpy as np
import pytest

from gradscope import Estimate
from gradscope.estimates import Moments, freedom_of, lognormal_error


def test_two_samples_by_hand():
    estimate = Moments.of([0.0, 2.0]).estimate()
    assert (estimate.value, estimate.stderr, estimate.num_probes, estimate.freedom) == (1, 1, 2, 1)
    assert estimate.log10_stderr == pytest.approx(1 / math.log(10))


def test_one_sample_has_no_error_and_an_exact_number_has_error_zero():
    assert Moments.of([3.0]).estimate().stderr is None
    assert Moments.of([3.0]).estimate().log10_stderr is None
    exact = Estimate.exact(3.0)
    assert (exact.stderr, exact.log10_stderr, exact.num_probes) == (0, 0, 0)


def test_numbers_beyond_float64():
    huge = Estimate(1.5, 0.15, 4000, 7)
    assert huge.value == math.inf
    assert huge.log10_value == pytest.approx(math.log10(1.5) + 4000 * math.log10(2), rel=1e-15)
    assert huge.log10_stderr == pytest.approx(0.1 / math.log(10))
    assert Estimate(1.5, 0.15, -4000).value == 0
    assert Estimate(0.0, 0.0).log10_value == -math.inf
    assert "10^(" in str(huge)
    assert str(Estimate(1.47, 0.012)) == "1.47 +- 0.012"
    assert str(Estimate(1.47, None)) == "1.47 +- ?"


@pytest.mark.parametrize("exponent", [0, 1, -1, 4001, -4001])
def test_square_root(exponent):
    root = Estimate(2.0, 0.1, exponent, 5).sqrt()
    assert root.log10_value == pytest.approx((math.log10(2) + exponent * math.log10(2)) / 2, abs=1e-9)
    assert root.log10_stderr == pytest.approx(0.05 / math.log(10) / 2, rel=1e-12)
    assert root.num_probes == 5


@pytest.mark.parametrize("shift", [0, 37, 4000, -4000])
def test_merging_is_the_same_as_all_at_once(shift):
    values = np.random.default_rng(0).lognormal(size=(20, 3))
    exponents = np.full((20, 1), shift)
    whole = Moments.of(values, exponents)
    for cut in (1, 7, 19):
        for a, b in ((slice(cut), slice(cut, None)), (slice(cut, None), slice(cut))):
            merged = Moments.of(values[a], exponents[a]).merge(Moments.of(values[b], exponents[b]))
            assert merged.count == 20
            scale = 2.0 ** (merged.exponent - whole.exponent)
            np.testing.assert_allclose(merged.mean * scale, whole.mean, rtol=1e-13)
            np.testing.assert_allclose(merged.m2 * scale**2, whole.m2, rtol=1e-12)
    np.testing.assert_allclose(whole.mean_variance * 4.0**0, values.var(axis=0, ddof=1) / 20, rtol=1e-12)


def test_values_of_very_different_exponents():
    # 1 * 2^5000 and 1 * 2^0: the small one is lost against the large one, the count is not.
    merged = Moments.of([1.0], [5000]).merge(Moments.of([1.0], [0]))
    assert merged.exponent == 5000
    assert float(merged.mean) == 0.5
    assert merged.count == 2


def test_no_values():
    with pytest.raises(ValueError, match="at least one value along the first axis"):
        Moments.of([])


def test_degrees_of_freedom_by_hand():
    assert freedom_of([2.0, -2.0, 2.0, -2.0]) == 3  # equal squares: n - 1
    assert freedom_of([1.0, 0.0, 0.0, 0.0, 0.0]) == 2  # one value dominates
    # Squares 4 and eight times 1: sum d^4 / (sum d^2)^2 = 24 / 144, so f / 2 - 1 = 1 / (1/6 - 1/9) - 1 = 17, at most 8.
    assert freedom_of([2.0, *[1.0] * 8]) == 8
    # Squares 9 and eight times 1: 89 / 289 - 1 / 9 = 512 / 2601.
    assert freedom_of([-3.0, *[1.0] * 8]) == pytest.approx(2601 / 512 - 1, rel=1e-12)
    assert freedom_of([1e-200 * d for d in (-3.0, *[1.0] * 8)]) == 2  # the squares are 0
    for unknown in ([0.0, 0.0], [1.0], [math.nan, 1.0], [math.inf, 1.0]):
        assert freedom_of(unknown) == 1  # n - 1, which is less than 2
    assert freedom_of([math.nan, 1.0, 2.0, 3.0]) == 2


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [
        (1, lambda p: math.tan(math.pi * (p - 0.5))),  # the distribution of Cauchy
        (2, lambda p: (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))),
        (math.inf, statistics.NormalDist().inv_cdf),
    ],
)
def test_the_interval_has_the_quantile_of_student(freedom, quantile):
    estimate = Estimate(2.0, 0.1, 3000, 5, freedom)
    for level in (0.68, 0.95):
        low, high = estimate.interval(level)
        margin = quantile(0.5 + level / 2) * 0.05 / math.log(10)
        centre = math.log10(2) + 3000 * math.log10(2)
        assert (low, high) == pytest.approx((centre - margin, centre + margin), rel=1e-12)
        # The logarithm of the square root: half the value, half the margin.
        assert estimate.sqrt().interval(level) == pytest.approx((low / 2, high / 2), rel=1e-12)


def test_the_error_of_the_mean_of_lognormal_numbers():
    # s^2 = ln 5 and n = 4: w = ln(1 + 4 / 4) = ln 2.
    w = math.log(2)
    assert lognormal_error(math.log(5), math.inf, 4) == pytest.approx(math.sqrt(w + w**2 / 4), rel=1e-12)
    # Eight probes of rank one: ln of a mean of eight squares of normal numbers has the variance trigamma(4).
    noise = math.pi**2 / 6 - 1 - 1 / 4 - 1 / 9
    assert lognormal_error(math.log(5) + noise, 4, 4) == pytest.approx(math.sqrt(w + w**2 / 4), rel=1e-12)
    # ln 5 with n = 1000 samples is seen well: both formulas hold, and the first-order error is sqrt(4 / 1000).
    assert lognormal_error(math.log(5), math.inf, 1000) == pytest.approx(math.sqrt(4 / 1000), rel=0.01)
    # A single probe: trigamma(1/2) = pi^2 / 2 exceeds 1.  Unknown variances count as 0.
    assert lognormal_error(9.0, 0.5, 4) == 0
    assert lognormal_error(0.1, 4, 4) == 0


@pytest.mark.parametrize("num", [15, 40, 160])
@pytest.mark.parametrize("s", [0.5, 1.0, 1.5, 2.0, 2.5, 3.0])
def test_the_error_of_a_lognormal_mean_is_that_of_simulated_means(s, num):
    # Half the width of the interval that contains the logarithm of 95 % of all means; its own error is 2 %.
    logs = np.random.default_rng(0).normal(scale=s, size=(4000, num))
    margin = np.quantile(abs(np.log(np.exp(logs).mean(axis=1)) - s**2 / 2), 0.95)
    # Fenton's formula alone is up to 3.2 times as wide.
    assert 0.95 < 1.96 * lognormal_error(s**2, math.inf, num) / margin < 1.55
