"""Parts of runs and medians over runs, with 95 % intervals that ask nothing of the distribution."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats


@dataclass(frozen=True)
class Part:
    """``count`` of ``num`` runs with the 95 % interval of Wilson; anything is possible where there are none."""

    count: int
    num: int

    @property
    def value(self) -> float:
        """NaN without runs."""
        return self.count / self.num if self.num else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Of the part, in 0..1."""
        if not self.num:
            return 0.0, 1.0
        found = stats.binomtest(self.count, self.num).proportion_ci(method="wilson")
        return float(found.low), float(found.high)

    @property
    def most(self) -> bool | None:
        """Whether it is more than half; None where the interval holds a half."""
        low, high = self.interval
        return True if low > 0.5 else False if high < 0.5 else None

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.num} runs ({100 * low:.0f} to {100 * high:.0f} %)"


def part(which: npt.ArrayLike) -> Part:
    """Of booleans, one a run."""
    array = np.asarray(which, dtype=bool)
    return Part(int(array.sum()), len(array))


@dataclass(frozen=True)
class Median:
    """A median with its 95 % interval by order statistics, which assumes nothing of the distribution.

    The interval goes from the j-th smallest of n to the j-th largest, j the largest with P(Binomial(n, 1/2) < j) at
    most 2.5 %; infinite where n < 6 leaves none (W. J. Conover, Practical Nonparametric Statistics, section 3.2).
    """

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        if not math.isfinite(self.high - self.low):
            return f"{self.value:g} (too few for an interval)"
        return f"{self.value:g} ({self.low:g} to {self.high:g})"


def median(values: npt.ArrayLike) -> Median:
    """Of independent values, one a run; NaN of none."""
    array = np.sort(np.asarray(values, dtype=np.float64))
    num = len(array)
    if not num:
        return Median(math.nan, -math.inf, math.inf)
    rank = int(stats.binom.ppf(0.025, num, 0.5))
    if stats.binom.cdf(rank, num, 0.5) <= 0.025:
        rank += 1
    if not rank:
        return Median(float(np.median(array)), -math.inf, math.inf)
    return Median(float(np.median(array)), float(array[rank - 1]), float(array[num - rank]))
