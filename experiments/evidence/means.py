"""Means over seeds with 95 % intervals, and comparisons of a mean with a bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from scipy import special

from experiments.evidence.words import measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Mean:
    """The mean of ``num`` independent values with its 95 % interval by Student's t; infinite for a single value.

    A comparison returns True if the whole interval agrees, False if the whole interval disagrees, else None.
    """

    value: float
    low: float
    high: float
    num: int

    def below(self, bound: float) -> bool | None:
        """Whether the mean is less than ``bound``."""
        return verdict(self.high < bound, self.low > bound)

    def above(self, bound: float) -> bool | None:
        """Whether the mean is greater than ``bound``."""
        return verdict(self.low > bound, self.high < bound)

    def between(self, low: float, high: float) -> bool | None:
        """Whether the mean is greater than ``low`` and less than ``high``."""
        return verdict(low < self.low and self.high < high, self.low > high or self.high < low)

    def within(self, wanted: float, tolerance: float) -> bool | None:
        """Whether the mean differs from ``wanted`` by less than ``tolerance``."""
        return self.between(wanted - tolerance, wanted + tolerance)

    def __format__(self, sign: str) -> str:
        """The mean with its interval, such as ``1.471 (1.462 to 1.480)``; ``sign`` may be ``+``."""
        if sign not in ("", "+"):
            raise ValueError(f"The interval of a mean decides its digits; the format may be '+' only, got {sign!r}.")
        if not math.isfinite(self.high - self.low):
            return f"{self.value:{sign}.4g} (one seed)"
        return measured(self.value, self.low, self.high, sign)

    def __str__(self) -> str:
        return format(self)


def verdict(supported: bool, contradicted: bool) -> bool | None:
    """True if ``supported``, False if ``contradicted``, and None if neither."""
    return True if supported else False if contradicted else None


def all_of(*verdicts: bool | None) -> bool | None:
    """True if every verdict is True, False if one is False, else None."""
    return verdict(all(verdicts), False in verdicts)


def mean(values: npt.ArrayLike, comparisons: int = 1) -> Mean:
    """The mean of independent values. With ``comparisons=n``, n intervals hold jointly at 95 % (Bonferroni)."""
    array = np.asarray(values, dtype=np.float64).ravel()
    if not len(array) or np.isnan(array).any():
        raise ValueError(f"A mean needs numbers, got {array.tolist()}.")
    value, num, margin = float(array.mean()), len(array), math.inf
    if num > 1:
        margin = float(special.stdtrit(num - 1, 1 - 0.025 / comparisons) * array.std(ddof=1) / math.sqrt(num))
    return Mean(value, value - margin, value + margin, num)


def geometric_mean(values: npt.ArrayLike, comparisons: int = 1) -> Mean:
    """The geometric mean of positive values, one per seed: `mean` of the logarithms, transformed back."""
    array = np.asarray(values, dtype=np.float64).ravel()
    if not (array > 0).all():
        raise ValueError(f"A geometric mean needs positive numbers, got {array.tolist()}.")
    logarithms = mean(np.log(array), comparisons)
    value, low, high = map(math.exp, (logarithms.value, logarithms.low, logarithms.high))
    return Mean(value, low, high, logarithms.num)


def errors(means: Sequence[Mean]) -> npt.NDArray[np.float64]:
    """Distances from the means to the ends of their intervals, of shape (2, n), for ``xerr`` or ``yerr``."""
    return np.array([[one.value - one.low, one.high - one.value] for one in means]).T


def errorbars(
    ax: Axes, places: npt.ArrayLike, means: Sequence[Mean], *, horizontal: bool = False, **style: Any
) -> None:
    """Draw means with their intervals at ``places`` on the x axis, or on the y axis if ``horizontal``."""
    values = [one.value for one in means]
    if horizontal:
        ax.errorbar(values, places, xerr=errors(means), **style)
    else:
        ax.errorbar(places, values, yerr=errors(means), **style)
