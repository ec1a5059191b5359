"""The mean change per layer against generalized least squares on levels, written out with NumPy and SciPy."""

import math

import numpy as np
import pytest
from scipy import stats

from gradscope.coefficients.drift import MODELS, drift, num_outer

# Unequal steps: rows need not be neighboring layers.
DEPTH = np.array([1.0, 2.0, 4.0, 9.0, 10.0, 13.0, 14.0])
CURVES = np.array([[0.3, 0.2, 0.9, 1.4, 2.1, 2.2, 2.0], [0.1, 0.3, 0.2, 1.9, 1.6, 2.7, 3.1]])


def oracle(depth, curve):
    """Slope, standard error and degrees of freedom of one curve: y = a + b d on levels.

    Each model has a known correlation and an unknown scale.  The models are weighted by their restricted likelihoods
    with the scale integrated out under the prior 1 / scale.
    """
    unit = np.diff(depth).mean()
    place = (depth - depth[0]) / unit
    design = np.stack([np.ones_like(place), place], axis=1)
    slopes, variances, logs = [], [], []
    for part, memory, prior in MODELS:
        levels = (1 - part) * np.minimum.outer(place + 1, place + 1)
        levels += part * np.power(memory, np.abs(np.subtract.outer(place, place))) / (2 * (1 - memory))
        inverse = np.linalg.inv(levels)
        information = design.T @ inverse @ design
        beta = np.linalg.solve(information, design.T @ inverse @ curve)
        residual = curve - design @ beta
        squares, freedom = residual @ inverse @ residual, len(curve) - 2
        slopes.append(beta[1])
        variances.append(np.linalg.inv(information)[1, 1] * squares / freedom)
        determinants = np.linalg.slogdet(levels)[1] + np.linalg.slogdet(information)[1]
        logs.append(math.log(prior) - determinants / 2 - freedom / 2 * math.log(squares))
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    mean = weights @ slopes
    return mean / unit, math.sqrt(weights @ (np.array(variances) + (slopes - mean) ** 2)) / unit, freedom


def test_drift_of_one_curve_is_generalized_least_squares_on_levels():
    slope, error, freedom = oracle(DEPTH, CURVES[0])
    found = drift(DEPTH, CURVES[:1])
    assert found.value == pytest.approx(slope, rel=1e-9)
    assert found.stderr == pytest.approx(error, rel=1e-9)
    assert found.freedom == freedom
    assert found.margin == pytest.approx(stats.t.ppf(0.975, freedom) * error, rel=1e-9)


def test_the_error_of_few_curves_is_that_of_a_mean_of_independent_values():
    (first, error, freedom), (second, other, _) = (oracle(DEPTH, curve) for curve in CURVES)
    found = drift(DEPTH, CURVES)
    assert found.value == pytest.approx((first + second) / 2, rel=1e-9)
    assert found.stderr == pytest.approx(math.sqrt(error**2 + other**2) / 2, rel=1e-9)
    assert found.freedom == 2 * freedom


def test_weights_of_the_models_sum_to_one():
    assert sum(prior for _, _, prior in MODELS) == pytest.approx(1)


def test_many_curves_are_compared_with_each_other():
    curves = np.outer(np.arange(1.0, 10.0), DEPTH)
    found = drift(DEPTH, curves)
    assert (found.value, found.stderr, found.freedom) == (5.0, pytest.approx(math.sqrt(7.5 / 9)), 8)


def test_eight_curves_are_many():
    curves = np.random.default_rng(3).normal(size=(8, 7)).cumsum(axis=1)
    assert drift(DEPTH, curves).freedom == 7
    assert drift(DEPTH, curves[:7]).freedom == 7 * (6 - 1)  # six changes of each curve, less their mean


@pytest.mark.parametrize(("change", "expected"), [(8.8, 1), (9.0, 2)])
def test_an_outlier_lies_six_robust_standard_deviations_from_the_median(change, expected):
    # The median of the 19 changes is 0, and that of their distances is 1: the limit is 6 * 1.4826 = 8.9.
    changes = [1.0, change, 0.0, *[-1.0] * 9, *[1.0] * 7]
    assert num_outer(np.arange(1.0, 21.0), np.cumsum([0.0, *changes])[None]) == expected


@pytest.mark.parametrize("networks", [1, 5, 40])
def test_a_change_of_another_kind_is_recognized_near_the_target_only(networks):
    rng = np.random.default_rng(0)
    depth, y = np.arange(1.0, 21.0), rng.normal(size=(networks, 20)).cumsum(axis=1)
    for place, expected in ((0, 1), (2, 3), (3, 1), (10, 1)):
        assert num_outer(depth, y + np.where(np.arange(20) > place, 40.0, 0.0)) == expected
    assert num_outer(depth[:6], y[:, :6] + np.where(np.arange(6) > 1, 40.0, 0.0)) == 0


def test_most_networks_decide_which_rows_are_left_out():
    rng = np.random.default_rng(0)
    depth, y = np.arange(1.0, 21.0), rng.normal(size=(5, 20)).cumsum(axis=1)
    jump = np.where(np.arange(20) > 2, 40.0, 0.0)
    for changed, expected in ((2, 1), (3, 3)):
        assert num_outer(depth, y + (np.arange(5) < changed)[:, None] * jump) == expected


def test_the_nearest_row_is_left_out_where_nine_remain():
    depth = np.arange(1.0, 11.0)
    assert (num_outer(depth, depth[None]), num_outer(depth[:9], depth[None, :9])) == (1, 0)


def test_walks_have_outliers_rarely():
    rng = np.random.default_rng(1)
    found = [num_outer(np.arange(25.0), rng.normal(size=(1, 25)).cumsum(axis=1)) for _ in range(1000)]
    assert found.count(1) >= 990


def test_curves_that_differ_by_more_than_their_changes_explain_are_compared_with_each_other():
    rng = np.random.default_rng(2)
    lines = np.outer([0.9, 1.0, 1.3], DEPTH) + 0.01 * rng.normal(size=(3, 7))
    slopes = np.array([oracle(DEPTH, line)[0] for line in lines])
    found = drift(DEPTH, lines)
    assert found.freedom == 2
    assert found.stderr == pytest.approx(slopes.std(ddof=1) / math.sqrt(3))
    assert drift(DEPTH, np.outer([1.0, 1.0, 1.0], DEPTH)).stderr == pytest.approx(0, abs=1e-12)
