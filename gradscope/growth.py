"""Does a coefficient grow with depth?  A fit of c * r^(k - l), an interval for r, and a verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]

EXPLODING_RATE, VANISHING_RATE = 1.02, 0.98
MIN_LAYERS = 6


@dataclass(frozen=True)
class Growth:
    """Growth of GSC (squared convention) by the factor ``rate`` a layer, away from the target.

    ``rate_low``, ``rate_high``: 95 % interval.  ``intercept``: c of c * r^(k - l).
    ``verdict``: "exploding" (a straight line on a log axis with rate_low > 1.02), "vanishing" (rate_high < 0.98),
    "stable" (the interval straddles 1 or lies within 0.98..1.02), else "irregular" (curved, or undecided).
    ``straight``: whether the half of the layers far from the target grows at the same rate.
    """

    rate: float
    intercept: float
    rate_low: float
    rate_high: float
    verdict: str
    straight: bool

    def __str__(self) -> str:
        """``rate 1.4730 (95 % interval 1.4612 to 1.4849) a layer, exploding``."""
        return (
            f"rate {self.rate:.4f} (95 % interval {self.rate_low:.4f} to {self.rate_high:.4f}) a layer, {self.verdict}"
        )


def fit_growth(log10_values: npt.ArrayLike, depth_from_output: npt.ArrayLike) -> Growth:
    """Fit log GSC against depth over the half of the layers nearer the target, where growth that persists is seen.

    Arguments:
        log10_values: log10 GSC, shape (layers,), or (seeds, layers) for independent initializations of one network.
        depth_from_output: Layers between each layer and the target, shape (layers,); the target itself (0) is left out.

    The slope is ordinary least squares.  Its standard error treats log GSC as a sum of independent increments, as it is
    in a random network, so neighboring layers are not counted as independent; with two or more seeds it comes from the
    spread between seeds instead.  Noise of probes never enters by itself.  The line is straight if the far half's slope
    agrees within three standard errors or 25 %.  Cost: O(seeds * layers).

    Raises:
        ValueError: Fewer than six layers, a coefficient that is exactly zero or not finite, or shapes that do not fit.
    """
    y = np.atleast_2d(np.asarray(log10_values, dtype=np.float64)) * math.log(10)
    depth = np.asarray(depth_from_output, dtype=np.float64)
    if y.shape[1:] != depth.shape:
        raise ValueError(f"log10_values of shape {y.shape} does not fit {depth.shape[0]} depths.")
    order = np.argsort(depth)
    order = order[depth[order] > 0]
    y, depth = y[:, order], depth[order]
    if len(depth) < MIN_LAYERS:
        raise ValueError(f"A growth rate needs at least {MIN_LAYERS} layers besides the target, got {len(depth)}.")
    if not np.isfinite(y).all():
        where = depth[~np.isfinite(y).all(axis=0)][0]
        raise ValueError(f"GSC is zero or not finite {where:g} layers from the target (a dead layer?): no rate exists.")

    half = len(depth) // 2
    if min(len(np.unique(depth[:half])), len(np.unique(depth[half:]))) < MIN_LAYERS // 2:
        raise ValueError(
            f"A growth rate needs {MIN_LAYERS // 2} or more different depths in each half of the layers, got "
            f"{', '.join(f'{d:g}' for d in np.unique(depth))}: layers inside one unit share its depth."
        )
    near, near_error, freedom = _slope(depth[: half + len(depth) % 2], y[:, : half + len(depth) % 2])
    far, far_error, _ = _slope(depth[half:], y[:, half:])
    straight = abs(far - near) <= max(3 * math.hypot(near_error, far_error), 0.25 * abs(near))
    margin = float(stats.t.ppf(0.975, freedom)) * near_error
    low, high = math.exp(near - margin), math.exp(near + margin)
    intercept = float(np.mean(y[:, : half + len(depth) % 2]) - near * np.mean(depth[: half + len(depth) % 2]))
    return Growth(math.exp(near), math.exp(intercept), low, high, _verdict(low, high, straight), straight)


def _slope(depth: FloatArray, y: FloatArray) -> tuple[float, float, int]:
    """Least-squares slope, its standard error, and the degrees of freedom of that error."""
    weights = (depth - depth.mean()) / np.square(depth - depth.mean()).sum()
    slopes = y @ weights
    seeds = len(slopes)
    if seeds > 1:
        return float(slopes.mean()), float(slopes.std(ddof=1) / math.sqrt(seeds)), seeds - 1
    # slope = sum of influence * increment, where an increment moves every later layer.
    influence = np.cumsum(weights[::-1])[::-1][1:]
    increments = np.diff(y[0])
    error = float(increments.std(ddof=1)) * float(np.linalg.norm(influence))
    return float(slopes[0]), error, len(increments) - 1


def _verdict(low: float, high: float, straight: bool) -> str:
    if low > EXPLODING_RATE and straight:
        return "exploding"
    if high < VANISHING_RATE:
        return "vanishing"
    if low <= 1 <= high or (low >= VANISHING_RATE and high <= EXPLODING_RATE):
        return "stable"
    return "irregular"
