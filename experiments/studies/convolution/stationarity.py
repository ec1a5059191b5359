"""Stationarity of images: mean and variance of a pixel by position, and covariance of two pixels by displacement.

Every squared deviation is a product of two estimates, one from each half of the images. Such a product is unbiased. The
square of one estimate would be too large, because it contains the square of the sampling error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """``mean`` (H, W) and ``covariance`` (H W, H W) of the pixels of gray images."""

    mean: FloatArray
    covariance: FloatArray

    @classmethod
    def of(cls, images: FloatArray) -> Moments:
        """Moments of ``images`` (N, H, W), N >= 2.  Cost: N (H W)^2."""
        if images.ndim != 3 or len(images) < 2:
            raise ValueError(f"Moments need at least two gray images (N, H, W), got shape {images.shape}.")
        mean = images.mean(axis=0)
        deviations = (images - mean).reshape(len(images), -1)
        return cls(mean, deviations.T @ deviations / (len(images) - 1))

    @property
    def variance(self) -> FloatArray:
        """Variance of each pixel, (H, W)."""
        return np.diag(self.covariance).reshape(self.mean.shape)

    @property
    def correlation(self) -> FloatArray:
        """Correlation of each pair of pixels, (H W, H W)."""
        deviation = np.sqrt(np.diag(self.covariance))
        return self.covariance / np.outer(deviation, deviation)


def mean_spread(first: Moments, second: Moments) -> float:
    """Standard deviation over positions of the mean of a pixel, divided by the standard deviation of a pixel."""
    return _spread(first.mean, second.mean) / float(np.sqrt((first.variance + second.variance).mean() / 2))


def variance_spread(first: Moments, second: Moments) -> float:
    """Standard deviation over positions of the variance of a pixel, divided by the mean variance."""
    return _spread(first.variance, second.variance) / float((first.variance + second.variance).mean() / 2)


def explained_by_displacement(first: FloatArray, second: FloatArray, shape: tuple[int, int]) -> float:
    """How much displacement explains of the differences between pairs of pixels, as a fraction (1 if stationary).

        1 - sum_pq (C_pq - S(q - p))^2 / sum_pq (C_pq - mean C)^2,    S(d) = mean of C_pq over pairs with q - p = d

    Arguments:
        first, second: Covariances or correlations C of all pairs, (H W, H W), from two halves of the images.
        shape: Height and width of the images (H, W).
    """
    groups = _displacements(shape)
    left, total = (((first - _means(first, by)) * (second - _means(second, by))).sum() for by in (groups, 0 * groups))
    return float(1 - left / total)


def along(first: Moments, second: Moments, axis: int, distances: int) -> tuple[FloatArray, FloatArray]:
    """Correlation of two pixels at the distances 0 .. ``distances`` - 1 along an axis (0: down, 1: across).

    Returns the mean and the standard deviation over positions.
    """
    pairs = "ijkj->jik" if axis == 0 else "ijil->ijl"  # in one column, or in one row
    halves = [np.einsum(pairs, moments.correlation.reshape(2 * moments.mean.shape)) for moments in (first, second)]
    mean, spread = np.empty(distances), np.empty(distances)
    for distance in range(distances):
        values = [np.diagonal(half, offset=distance, axis1=1, axis2=2) for half in halves]
        mean[distance] = (values[0].mean() + values[1].mean()) / 2
        spread[distance] = _spread(*values)
    return mean, spread


def _spread(first: FloatArray, second: FloatArray) -> float:
    """Standard deviation over positions; 0 if a sampling error makes the estimated square negative."""
    square = ((first - first.mean()) * (second - second.mean())).mean()
    return float(np.sqrt(max(float(square), 0.0)))


def _displacements(shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """An integer for each pair of pixels that identifies their displacement, (H W, H W)."""
    height, width = shape
    rows, columns = (place.ravel() for place in np.mgrid[:height, :width])
    down, across = rows[None] - rows[:, None], columns[None] - columns[:, None]
    return (down + height - 1) * (2 * width - 1) + across + width - 1


def _means(values: FloatArray, groups: npt.NDArray[np.int64]) -> FloatArray:
    """An array that replaces each entry by the mean over the group of that entry."""
    flat = groups.ravel()
    sums, counts = np.bincount(flat, weights=values.ravel()), np.bincount(flat)
    return (sums / np.maximum(counts, 1))[groups]
