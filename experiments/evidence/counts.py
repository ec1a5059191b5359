"""Proportions of runs and medians over runs, with 95 % intervals that assume nothing about the distribution.

Runs of one cell (such as one network at one learning rate) resemble each other, so whole cells are resampled (cluster
bootstrap: A. C. Davison and D. V. Hinkley, Bootstrap Methods and their Application, section 3.8). If all runs agree,
the bootstrap finds no spread. Therefore the interval is widened to contain also the interval for independent runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from experiments.evidence.means import verdict

FloatArray = npt.NDArray[np.float64]
RESAMPLES = 2000


def draws(cells: npt.ArrayLike, *, generator: np.random.Generator) -> FloatArray:
    """How often each run is drawn if cells are resampled, shape (RESAMPLES, runs). ``cells``: the cell of each run."""
    codes, names = pd.factorize(np.asarray(cells))
    num = len(names)
    times = generator.multinomial(num, np.full(num, 1 / max(num, 1)), size=RESAMPLES)
    return times[:, codes].astype(np.float64)


def interval(resampled: FloatArray) -> tuple[float, float]:
    """The middle 95 % of the resampled values that are not NaN; (-inf, inf) if all are NaN."""
    known = resampled[np.isfinite(resampled)]
    low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (-math.inf, math.inf)
    return float(low), float(high)


def ratio(over: FloatArray, under: FloatArray) -> FloatArray:
    """``over / under``; NaN where ``under`` is zero."""
    return np.divide(over, under, out=np.full(len(over), math.nan), where=under > 0)


@dataclass(frozen=True)
class Part:
    """The proportion ``count`` / ``num`` of runs, with Wilson's 95 % interval.

    For runs in cells, ``resampled`` is the interval by resampling. The interval is then widened to contain both.
    """

    count: int
    num: int
    resampled: tuple[float, float] | None = None

    @property
    def value(self) -> float:
        """The proportion; NaN without runs."""
        return self.count / self.num if self.num else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the proportion; 0 to 1 without runs."""
        if not self.num:
            return 0.0, 1.0
        found = stats.binomtest(self.count, self.num).proportion_ci(method="wilson")
        low, high = self.resampled or (1.0, 0.0)
        return min(float(found.low), low), max(float(found.high), high)

    def above(self, limit: float) -> bool | None:
        """Whether the proportion is more than ``limit``; None if the interval contains ``limit``."""
        low, high = self.interval
        return verdict(low > limit, high < limit)

    @property
    def most(self) -> bool | None:
        """Whether the proportion is more than half; None if the interval contains a half."""
        return self.above(0.5)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count} of {self.num} runs ({100 * low:.0f} to {100 * high:.0f} %)"


def part(which: npt.ArrayLike, drawn: FloatArray | None = None) -> Part:
    """The proportion of runs for which ``which`` is True. For runs in cells, ``drawn`` is the result of `draws`."""
    array = np.asarray(which, dtype=bool)
    resampled = None
    if drawn is not None and len(array):
        resampled = interval(ratio(drawn @ array, drawn.sum(axis=1)))
    return Part(int(array.sum()), len(array), resampled)


@dataclass(frozen=True)
class Median:
    """A median with its 95 % interval by order statistics, which assumes nothing about the distribution.

    The interval goes from the j-th smallest of n values to the j-th largest (W. J. Conover, Practical Nonparametric
    Statistics, section 3.2). Here j is the largest number with P(Binomial(n, 1/2) < j) <= 2.5 %. For n < 6 there is no
    such j >= 1, and the interval is infinite.
    """

    value: float
    low: float
    high: float

    def __format__(self, unit: str) -> str:
        """The median with a plural as its unit, and its interval: ``f"{median:steps}"`` gives ``5 steps (3 to 8)``."""
        words = (f"{self.value:g}", unit.removesuffix("s") if self.value == 1 else unit)
        ends = f"{self.low:g} to {self.high:g}" if self.low < self.high else "no spread"
        if not math.isfinite(self.high - self.low):
            ends = "too few runs for an interval"
        return f"{' '.join(filter(None, words))} ({ends})"

    def __str__(self) -> str:
        return format(self)


def median(values: npt.ArrayLike, drawn: FloatArray | None = None) -> Median:
    """The median of one value per run; NaN without values. For runs in cells, ``drawn`` is the result of `draws`."""
    unsorted = np.asarray(values, dtype=np.float64)
    order = np.argsort(unsorted, kind="stable")
    array, num = unsorted[order], len(unsorted)
    if not num:
        return Median(math.nan, -math.inf, math.inf)
    middle = float(np.median(array))
    rank = int((stats.binom.cdf(np.arange(num), num, 0.5) <= 0.025).sum())
    if not rank:
        return Median(middle, -math.inf, math.inf)
    low, high = float(array[rank - 1]), float(array[num - rank])
    if drawn is not None:
        lower, upper = interval(_medians(array, drawn[:, order]))
        low, high = min(low, lower), max(high, upper)
    return Median(middle, low, high)


def _medians(array: FloatArray, times: FloatArray) -> FloatArray:
    """One median per row of ``times``, which says how often each sorted value occurs; NaN for a row of zeros."""
    passed, total = times.cumsum(axis=1), times.sum(axis=1, keepdims=True)
    ends = ((passed >= total / 2).argmax(axis=1), (passed > total / 2).argmax(axis=1))
    return np.where(total[:, 0] > 0, (array[ends[0]] + array[ends[1]]) / 2, math.nan)
