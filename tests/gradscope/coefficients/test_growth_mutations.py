"""The fit of a growth rate against generalized least squares on levels, written out with NumPy."""

import math

import numpy as np
import pytest
from scipy import stats

from gradscope.coefficients.growth import fit_growth

LN10 = math.log(10)
# Unequal steps, and a far half whose only purpose is that the fit may ignore it.
NEAR = np.array([1.0, 2.0, 4.0, 9.0, 10.0, 13.0])
DEPTH = np.concatenate([NEAR, 14 + np.arange(6.0)])
VALUES = np.concatenate([[0.3, 0.2, 0.9, 1.4, 2.1, 2.2], 2.3 + 0.2 * np.arange(6.0)])
NOISE = np.concatenate([[0.02, 0.3, 0.05, 0.25, 0.1, 0.02], np.full(6, 0.02)])


def oracle(values, depth, noise):
    """Slope and standard error on levels: y = a + b d, covariance s^2 min(d, d') + noise.

    The intercept is free, which makes this the same as a fit of increments.  s^2 is found by the same three rounds of
    moments: squared residuals of increments per unit of depth, less their measurement noise.
    """
    y, e = values * LN10, noise * LN10
    steps, changes = np.diff(depth), np.diff(y)
    design = np.stack([np.ones_like(depth), depth], axis=1)
    slope = (y[-1] - y[0]) / (depth[-1] - depth[0])
    for _ in range(3):
        residual = (changes - slope * steps) ** 2 / steps
        walk = max(sum(residual) - sum((e[:-1] ** 2 + e[1:] ** 2) / steps), 0) / (len(steps) - 1)
        covariance = walk * np.minimum.outer(depth, depth) + np.diag(e**2)
        information = design.T @ np.linalg.inv(covariance) @ design
        slope = (np.linalg.inv(information) @ design.T @ np.linalg.inv(covariance) @ y)[1]
    return slope, math.sqrt(np.linalg.inv(information)[1, 1])


@pytest.mark.parametrize("noise", [NOISE, 0.3 * NOISE], ids=["noise of probes dominates", "both count"])
def test_slope_and_error_are_those_of_generalized_least_squares(noise):
    slope, error = oracle(VALUES[:6], NEAR, noise[:6])
    growth = fit_growth(VALUES, DEPTH, noise)
    assert math.log(growth.rate) == pytest.approx(slope, rel=1e-9)
    margin = stats.t.ppf(0.975, 4) * error
    assert math.log(growth.rate_high / growth.rate) == pytest.approx(margin, rel=1e-6)
    assert math.log(growth.rate / growth.rate_low) == pytest.approx(margin, rel=1e-6)


def test_unequal_steps_of_an_exact_line():
    growth = fit_growth(DEPTH * math.log10(1.3), DEPTH)
    assert growth.rate == pytest.approx(1.3, rel=1e-9)
    assert growth.intercept == pytest.approx(1.0, rel=1e-9)
    assert growth.straight
