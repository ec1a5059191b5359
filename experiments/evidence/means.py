"""Means over seeds with their 95 % intervals, as numbers and as words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """The mean of ``num`` independent values, and its interval of Student's t, 95 %; infinite with a single value."""

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

    def below(self, bound: float) -> bool | None:
        """Whether the mean lies below ``bound``; None where the interval contains it."""
        return below(self, bound)

    def above(self, bound: float) -> bool | None:
        """Whether the mean lies above ``bound``; None where the interval contains it."""
        return above(self, bound)

    def within(self, wanted: float, tolerance: float) -> bool | None:
        """Whether the mean lies within ``tolerance`` of ``wanted``; None where the interval contains an end of that."""
        return within(self, wanted, tolerance)


def mean(values: npt.ArrayLike, comparisons: int = 1) -> Mean:
    """Of independent values, one a seed.

    With ``comparisons`` the interval is one of so many that hold together at 95 % (Bonferroni): its own level is
    1 - 0.05 / comparisons.

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


def geometric_mean(values: npt.ArrayLike, comparisons: int = 1) -> Mean:
    """Of positive values whose logarithms are nearly normal; the interval is that of their mean, as in `mean`.

    Raises:
        ValueError: There are none, or one is not positive.
    """
    array = np.asarray(values, dtype=np.float64).ravel()
    if not (array > 0).all():
        raise ValueError(f"A geometric mean needs positive numbers, got {array.tolist()}.")
    logarithms = mean(np.log(array), comparisons)
    value, low, high = (math.exp(end) for end in (logarithms.value, logarithms.low, logarithms.high))
    return Mean(value, low, high, logarithms.num)


def below(found: Mean, bound: float) -> bool | None:
    """Whether a mean lies below ``bound``: True or False where its whole interval does or does not, else None."""
    return True if found.high < bound else False if found.low > bound else None


def above(found: Mean, bound: float) -> bool | None:
    """Whether a mean lies above ``bound``, likewise."""
    return True if found.low > bound else False if found.high < bound else None


def within(found: Mean, wanted: float, tolerance: float) -> bool | None:
    """Whether a mean lies within ``tolerance`` of ``wanted``: the whole interval inside, or outside, else None."""
    if wanted - tolerance < found.low and found.high < wanted + tolerance:
        return True
    return False if found.low > wanted + tolerance or found.high < wanted - tolerance else None


def all_of(*verdicts: bool | None) -> bool | None:
    """Whether everything holds; False as soon as one does not, None while one is open."""
    return False if False in verdicts else None if None in verdicts else True


def told(
    verdicts: Mapping[tuple[str, str], bool | None] | Mapping[str, bool | None],
    supported: str, contradicted: str, undecided: str,
) -> str:  # fmt: skip
    """A sentence for each verdict that occurs, in that order, with the names it is said of in place of ``{}``.

    Names in pairs are put together by the first: ``selu (wider, residual)``.
    """
    sentences = {True: supported, False: contradicted, None: undecided}
    parts = []
    for verdict, sentence in sentences.items():
        names: dict[str, list[str]] = {}
        for name, own in verdicts.items():
            if own is verdict:
                first, second = name if isinstance(name, tuple) else (name, "")
                names.setdefault(first, []).append(second)
        if names:
            words = [f"{first} ({', '.join(seconds)})" if any(seconds) else first for first, seconds in names.items()]
            parts.append(sentence.format(listed(words)))
    return " ".join(filter(None, parts))


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
