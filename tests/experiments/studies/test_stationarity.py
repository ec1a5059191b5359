"""Stationarity of images, against fields whose covariance is known."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

from experiments.studies.convolution.stationarity import (
    Moments,
    along,
    explained_by_displacement,
    mean_spread,
    variance_spread,
)

H, W = 6, 5


def fields(num, seed, gain=1.0, offset=0.0):
    """White noise summed over windows of 3 x 3, times a gain and plus an offset by position."""
    noise = np.random.default_rng(seed).normal(size=(num, H + 2, W + 2))
    return gain * sliding_window_view(noise, (3, 3), axis=(1, 2)).sum(axis=(3, 4)) / 3 + offset


def halves(num=20_000, **kwargs):
    return [Moments.of(fields(num, seed, **kwargs)) for seed in (0, 1)]


def truth(gain):
    """Covariances of all pairs, by hand: the part of a window that two of them share, times both gains."""
    places = [(i, j) for i in range(H) for j in range(W)]
    gains = np.broadcast_to(gain, (H, W)).ravel()
    shared = [[max(0, 3 - abs(i - k)) * max(0, 3 - abs(j - m)) / 9 for k, m in places] for i, j in places]
    return np.array(shared) * np.outer(gains, gains)


def test_the_field_has_the_covariance_that_it_should():
    gain = 1 + 0.1 * np.arange(H)[:, None]
    np.testing.assert_allclose(halves(gain=gain)[0].covariance, truth(gain), atol=0.06)


def test_a_stationary_field():
    first, second = halves()
    assert explained_by_displacement(first.covariance, second.covariance, (H, W)) == pytest.approx(1, abs=1e-3)
    assert mean_spread(first, second) < 0.01
    assert variance_spread(first, second) < 0.01
    for axis in (0, 1):
        mean, spread = along(first, second, axis, 4)
        np.testing.assert_allclose(mean, [1, 2 / 3, 1 / 3, 0], atol=0.01)
        np.testing.assert_allclose(spread, 0, atol=0.01)


def test_few_images_give_no_dependence_on_the_position_on_average():
    # 30 images a half: the square of one half's deviations would be far from 0 here.
    found = [explained_by_displacement(*(m.covariance for m in _few(seed)), (H, W)) for seed in range(200)]
    assert np.mean(found) == pytest.approx(1, abs=3 * np.std(found) / np.sqrt(200))
    naive = [explained_by_displacement(m.covariance, m.covariance, (H, W)) for m in _few(0)]
    assert max(naive) < 0.9


def _few(seed):
    return [Moments.of(fields(30, (seed, half))) for half in (0, 1)]


def test_a_gain_by_position():
    gain = 1 + 0.2 * np.arange(H)[:, None] + 0.1 * np.arange(W)
    first, second = halves(gain=gain)
    covariance, variance = truth(gain), gain**2
    by_displacement = {}
    places = [(i, j) for i in range(H) for j in range(W)]
    for p, (i, j) in enumerate(places):
        for q, (k, m) in enumerate(places):
            by_displacement.setdefault((k - i, m - j), []).append(covariance[p, q])
    left = sum(np.var(values) * len(values) for values in by_displacement.values())
    expected = 1 - left / (np.var(covariance) * covariance.size)
    found = explained_by_displacement(first.covariance, second.covariance, (H, W))
    assert found == pytest.approx(expected, abs=0.01)
    assert explained_by_displacement(first.correlation, second.correlation, (H, W)) == pytest.approx(1, abs=1e-3)
    assert variance_spread(first, second) == pytest.approx(np.std(variance) / np.mean(variance), rel=0.02)


def test_a_mean_by_position():
    offset = np.linspace(-1, 1, W)[None] * np.ones((H, 1))
    first, second = halves(offset=offset)
    assert mean_spread(first, second) == pytest.approx(np.std(offset), rel=0.03)  # pixels have variance 1
    assert explained_by_displacement(first.covariance, second.covariance, (H, W)) == pytest.approx(1, abs=1e-3)


def test_correlations_along_an_axis_by_hand():
    # Columns are copies of one another, rows are independent.
    noise = np.random.default_rng(0).normal(size=(4000, H, 1)) * np.ones(W)
    moments = Moments.of(noise[::2]), Moments.of(noise[1::2])
    np.testing.assert_allclose(along(*moments, 1, 3)[0], 1)
    np.testing.assert_allclose(along(*moments, 0, 3)[0], [1, 0, 0], atol=0.03)


def test_one_image_has_no_variance():
    with pytest.raises(ValueError, match=r"at least two gray images \(N, H, W\), got shape \(1, 4, 4\)"):
        Moments.of(np.zeros((1, 4, 4)))
