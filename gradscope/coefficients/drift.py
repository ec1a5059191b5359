"""The mean change of a random curve per layer, and its error: from one curve, or from several independent curves.

The changes of log GSC from row to row are correlated: lengths of layers revert to a fixed point, so an opposite change
follows a large one.  Changes contain the noise of random probes, because the same cotangents pass through all rows.
The error of the mean change is therefore taken from the changes themselves, and no noise is added for probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import special

FloatArray = npt.NDArray[np.float64]

# A model: a curve is a random walk plus a stationary part.  The tuple holds the weight of the stationary part, its
# correlation between neighboring rows (0 describes kinds of layers that alternate), and the prior weight of the model.
MODELS = (
    (0.0, 0.8, 0.8),
    (0.3, 0.8, 0.025), (0.5, 0.8, 0.025), (0.7, 0.8, 0.025), (0.85, 0.8, 0.025),
    (0.5, 0.0, 0.1 / 3), (0.8, 0.0, 0.1 / 3), (0.95, 0.0, 0.1 / 3),
)  # fmt: skip
# From this number of curves on, only the spread between curves is used: it needs no model of the rows.
MANY = 8
# Level of the test whether curves differ by more than their changes explain.
SIGNIFICANT = 0.05
# Relative squared residual below which a curve is a line up to rounding.
ROUNDING = 1e-24
# A change among the first OUTERMOST is left out if it lies this many robust standard deviations from the median.
OUTERMOST, OUTLIER = 3, 6.0
# The row nearest the target is left out if at least this number of rows remains.
ENOUGH = 9


@dataclass(frozen=True)
class Drift:
    """Mean change per layer, its standard error, and the degrees of freedom of Student's t."""

    value: float
    stderr: float
    freedom: float

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval."""
        return float(special.stdtrit(self.freedom, 0.975)) * self.stderr


def drift(depth: FloatArray, curves: FloatArray) -> Drift:
    """Return the mean change per layer of independent curves, with its error.

    Arguments:
        depth: Layers between each row and the target, increasing, shape (rows,).
        curves: Values of the curves, shape (curves, rows).

    The value is the mean of the values of the single curves.  The error comes from the errors of the single curves,
    unless there are at least `MANY` curves, or they differ by more than these errors explain: then it comes from the
    spread between curves.  The latter is an F test at level `SIGNIFICANT`.
    """
    singles = [_single(depth, curve) for curve in curves]
    if len(singles) == 1:
        return singles[0]
    values, errors = np.array([[one.value, one.stderr] for one in singles]).T
    value, count = float(values.mean()), len(values)
    within = Drift(value, float(np.linalg.norm(errors)) / count, sum(one.freedom for one in singles))
    between = Drift(value, float(values.std(ddof=1)) / math.sqrt(count), count - 1)
    # Without any error, rounding must not make the ratio significant.
    ratio = (between.stderr / max(within.stderr, 1e-9 * abs(value), 1e-300)) ** 2
    differ = special.fdtrc(between.freedom, within.freedom, ratio) < SIGNIFICANT
    return between if count >= MANY or differ else within


def _single(depth: FloatArray, curve: FloatArray) -> Drift:
    """Return the mean change per layer of one curve, with the error that its changes imply.

    For each model of the rows, generalized least squares on the changes gives a value and its error.  The models are
    averaged with weights prior times likelihood.  Cost: O(rows^2) per model; O(rows^3) at the first call.
    """
    unit = float(np.diff(depth).mean())
    steps, changes = np.diff(depth) / unit, np.diff(curve)
    freedom = len(changes) - 1
    precision, log_determinant, prior = _models(tuple(steps))
    weighted = precision @ steps  # (models, changes)
    information = weighted @ steps
    values = weighted @ changes / information
    residual = changes - values[:, None] * steps  # (models, changes)
    squares = np.sum((precision @ residual[:, :, None])[:, :, 0] * residual, axis=1)
    if (line := squares <= ROUNDING * np.sum(np.square(changes))).any():  # an exact line: all models agree
        return Drift(float(values[line][0]) / unit, 0.0, freedom)
    evidence = log_determinant + np.log(information) + freedom * np.log(squares)
    posterior = special.softmax(np.log(prior) - evidence / 2)
    mean = float(posterior @ values)
    variance = float(posterior @ (squares / freedom / information + np.square(values - mean)))
    return Drift(mean / unit, math.sqrt(variance) / unit, freedom)


@lru_cache(maxsize=64)
def _models(steps: tuple[float, ...]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Inverse covariance of the changes, log determinant of the covariance, and prior weight, of every model."""
    place = np.concatenate([[0.0], np.cumsum(steps)])
    distance = np.abs(place[:, None] - place)
    part, memory, prior = (column[:, None, None] for column in np.array(MODELS).T)
    levels = (1 - part) * np.minimum.outer(place, place) + part * np.power(memory, distance) / (2 * (1 - memory))
    covariance = np.diff(np.diff(levels, axis=1), axis=2)
    return np.linalg.inv(covariance), np.linalg.slogdet(covariance)[1], prior.ravel()


def num_outer(depth: FloatArray, curves: FloatArray) -> int:
    """Return how many rows nearest the target to leave out, because they may belong to layers of another kind.

    A final normalization or pooling changes GSC once.  This change says nothing about the layers that repeat, and it
    would dominate their spread.  The row nearest the target is always left out if at least `ENOUGH` rows remain.
    Further rows are left out if most curves, each by itself, have an outlier there among their changes per layer.  At
    least four changes remain.  Thus the number of networks does not decide which rows are left out.
    """
    changes = np.diff(curves, axis=1) / np.diff(depth)
    distance = np.abs(changes - np.median(changes, axis=1, keepdims=True))
    allowed = OUTLIER * 1.4826 * np.median(distance, axis=1, keepdims=True) + 1e-12
    outlying = (distance > allowed)[:, : max(0, min(OUTERMOST, changes.shape[1] - 4))]
    found = (outlying * np.arange(1, outlying.shape[1] + 1)).max(axis=1, initial=0)
    return max(int(np.quantile(found, 0.5, method="lower")), int(len(depth) > ENOUGH))
