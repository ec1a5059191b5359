"""Growth of a coefficient with depth: a fit of c * r^(k - l), an interval for r, and a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]

EXPLODING_RATE, VANISHING_RATE = 1.02, 0.98
MIN_LAYERS = 6

# An interval around 1 wider than this is inconclusive.
WIDEST_STABLE = 0.1

_ROUNDS = 3
_FLOOR = 1e-20


@dataclass(frozen=True)
class Growth:
    """Growth of GSC (squared convention) by the factor ``rate`` per layer, counted from the target.

    ``rate_low``, ``rate_high``: 95 % interval.  ``intercept``: c of c * r^(k - l).
    ``verdict``: "exploding" (a straight line on a log axis with rate_low > 1.02), "vanishing" (rate_high < 0.98),
    "stable" (the interval contains 1 and lies in 0.9..1.1, or it lies in 0.98..1.02), else "irregular" (curved or
    undecided).  ``straight``: whether GSC grows at the same rate far from the target and near the target.

    >>> from gradscope.coefficients.growth import fit_growth
    >>> print(fit_growth([0.6, 0.5, 0.4, 0.3, 0.2, 0.1], [6, 5, 4, 3, 2, 1]))
    rate 1.2589 (95 % interval 1.2589 to 1.2589) per layer, exploding
    """

    rate: float
    intercept: float
    rate_low: float
    rate_high: float
    verdict: str
    straight: bool

    def __str__(self) -> str:
        """Return ``rate 1.4730 (95 % interval 1.4612 to 1.4849) per layer, exploding``."""
        interval = f"95 % interval {self.rate_low:.4f} to {self.rate_high:.4f}"
        return f"rate {self.rate:.4f} ({interval}) per layer, {self.verdict}"


def fit_growth(
    log10_values: npt.ArrayLike, depth_from_output: npt.ArrayLike, log10_stderr: npt.ArrayLike = 0.0
) -> Growth:
    """Return the growth of log GSC with depth, fitted over the half of the layers nearer the target.

    Arguments:
        log10_values: log10 GSC, shape (layers,), or (seeds, layers) for independent initializations of one network.
        depth_from_output: Number of units from each layer to the target, shape (layers,); the target (0) is ignored.
        log10_stderr: Standard errors due to probes, in the shape of log10_values; NaN (unknown) counts as 0.

    Log GSC of a random network is modeled as a random walk over layers (covariance s^2 min(d, d') between depths d and
    d') plus independent measurement noise.  The slope is the generalized least-squares estimate in this model, and s^2
    is estimated from the residual increments.  With two or more seeds, the spread between seeds gives the error.
    Layers of equal depth are averaged.  The line is straight if the slopes of both halves agree within three standard
    errors or 25 %.  Cost: O(seeds * layers^2 + layers^3).

    Raises:
        ValueError: Fewer than six layers, a coefficient that is exactly zero or not finite, or shapes that do not fit.
    """
    y = np.atleast_2d(np.asarray(log10_values, dtype=np.float64)) * math.log(10)
    depth = np.asarray(depth_from_output, dtype=np.float64)
    if y.shape[1:] != depth.shape:
        raise ValueError(f"log10_values has shape {y.shape}, but depth_from_output has {depth.shape[0]} entries.")
    noise = np.nan_to_num(np.broadcast_to(np.asarray(log10_stderr, dtype=np.float64), y.shape)) * math.log(10)
    kept = depth > 0
    y, noise, depth = y[:, kept], noise[:, kept], depth[kept]
    if len(depth) < MIN_LAYERS:
        raise ValueError(f"A growth rate needs at least {MIN_LAYERS} layers besides the target, got {len(depth)}.")
    if not np.isfinite(y).all():
        where = depth[~np.isfinite(y).all(axis=0)][0]
        raise ValueError(f"GSC is zero or not finite {where:g} layers from the target (a dead layer?): no rate exists.")

    depth, place, count = np.unique(depth, return_inverse=True, return_counts=True)
    half = len(depth) // 2
    if half < MIN_LAYERS // 2:
        raise ValueError(
            f"A growth rate needs at least {MIN_LAYERS // 2} different depths in each half of the layers, got "
            f"{', '.join(f'{d:g}' for d in depth)}: layers inside one unit have the same depth."
        )
    average = np.zeros((len(place), len(depth)))
    average[np.arange(len(place)), place] = 1 / count[place]
    y, noise = y @ average, np.sqrt(np.square(noise) @ np.square(average))
    end = half + len(depth) % 2
    near, near_error, freedom = _slope(depth[:end], y[:, :end], noise[:, :end])
    far, far_error, _ = _slope(depth[half:], y[:, half:], noise[:, half:])
    straight = abs(far - near) <= max(3 * math.hypot(near_error, far_error), 0.25 * abs(near))
    margin = float(special.stdtrit(freedom, 0.975)) * near_error
    low, high = math.exp(near - margin), math.exp(near + margin)
    intercept = float(np.mean(y[:, :end]) - near * np.mean(depth[:end]))
    return Growth(math.exp(near), math.exp(intercept), low, high, _verdict(low, high, straight), straight)


def _slope(depth: FloatArray, y: FloatArray, noise: FloatArray) -> tuple[float, float, int]:
    """Return the generalized least-squares slope, its standard error, and the degrees of freedom of that error.

    The fit uses increments between layers.  The random walk makes them independent; noise correlates neighboring ones.
    """
    steps, increments = np.diff(depth), np.diff(y, axis=1)
    slopes, errors = [], []
    for change, own in zip(increments, np.square(noise), strict=True):
        measured = np.diag(own[:-1] + own[1:]) - np.diag(own[1:-1], 1) - np.diag(own[1:-1], -1)
        slope = change.sum() / steps.sum()
        for _ in range(_ROUNDS):
            residual = np.square(change - slope * steps) / steps
            walk = max(residual.sum() - (np.diag(measured) / steps).sum(), 0.0) / (len(steps) - 1)
            # The floor avoids division by zero for an exact line, and is too small to change the weights.
            covariance = measured + np.diag((walk + _FLOOR) * steps)
            weights = np.linalg.solve(covariance, steps)
            slope = float(weights @ change / (weights @ steps))
        slopes.append(slope)
        errors.append(math.sqrt(max(1 / float(weights @ steps) - _FLOOR / steps.sum(), 0.0)))
    if len(slopes) > 1:
        return float(np.mean(slopes)), float(np.std(slopes, ddof=1) / math.sqrt(len(slopes))), len(slopes) - 1
    return slopes[0], errors[0], len(steps) - 1


def _verdict(low: float, high: float, straight: bool) -> str:
    if low > EXPLODING_RATE and straight:
        return "exploding"
    if high < VANISHING_RATE:
        return "vanishing"
    if 1 - WIDEST_STABLE <= low <= 1 <= high <= 1 + WIDEST_STABLE or (low >= VANISHING_RATE and high <= EXPLODING_RATE):
        return "stable"
    return "irregular"
