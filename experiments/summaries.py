"""Means over seeds with their 95 % intervals, as numbers and as words."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """The mean of ``num`` independent values, and its 95 % interval of Student's t; infinite with a single value."""

    value: float
    low: float
    high: float
    num: int

    def __format__(self, form: str) -> str:
        """``1.471 (1.462 to 1.480)``; the value alone where there is no interval."""
        form = form or ".4g"
        if not math.isfinite(self.high - self.low):
            return f"{self.value:{form}} (one seed)"
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


def mean(values: npt.ArrayLike, *, comparisons: int = 1) -> Mean:
    """Of independent values, one a seed; intervals of so many ``comparisons`` hold together at 95 % (Bonferroni).

    Raises:
        ValueError: There are none, or one is NaN.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or np.isnan(array).any():
        raise ValueError(f"A mean needs numbers, got {array.tolist()}.")
    value, num = float(array.mean()), len(array)
    margin = (
        math.inf
        if num < 2
        else float(stats.t.ppf(1 - 0.025 / comparisons, num - 1) * array.std(ddof=1) / math.sqrt(num))
    )
    return Mean(value, value - margin, value + margin, num)


def geometric_mean(values: npt.ArrayLike, *, comparisons: int = 1) -> Mean:
    """Of positive values whose logarithms are nearly normal; the interval is that of their mean, as for `mean`.

    Raises:
        ValueError: There are none, or one is not positive.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not (array > 0).all():
        raise ValueError(f"A geometric mean needs positive numbers, got {array.tolist()}.")
    logarithms = mean(np.log(array), comparisons=comparisons)
    value, low, high = (math.exp(end) for end in (logarithms.value, logarithms.low, logarithms.high))
    return Mean(value, low, high, logarithms.num)
