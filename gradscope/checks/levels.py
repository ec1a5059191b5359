"""How large a deviation must be: the checks of a healthy network share one probability of a false alarm."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import special

FALSE_ALARMS = 0.04  # probability of any false alarm in a healthy network
CHECKS = 3  # with equal shares: comparison with siblings, comparison with theory, step sizes in training
EFFICIENCY = 0.82  # of the robust scale, for normal values


def limit(tests: float, freedom: float = np.inf) -> float:
    """Return the limit of |z| for one of ``tests`` tests of a check: a quantile of Student's distribution.

    With this limit, one check of a healthy network gives a false alarm with probability `FALSE_ALARMS` / `CHECKS`
    (Bonferroni).  ``freedom``: degrees of freedom of the scale in z; infinite if the scale is known.

    >>> round(limit(20), 2), round(limit(20, 8), 2)
    (3.4, 5.37)
    """
    return -float(special.stdtrit(freedom, FALSE_ALARMS / CHECKS / 2 / tests))


def scale(values: npt.NDArray[np.float64]) -> float:
    """Return a robust standard deviation of n >= 2 values; z-scores in its unit have `freedom` (n) degrees of freedom.

    It is Q_n = 2.22 times the k-th smallest difference of two values, k = h (h - 1) / 2, h = floor(n / 2) + 1.  Up to
    half of the values may be wrong.  Without a correction for small n, Q_n is up to 1.5 times too large.

    Reference: Rousseeuw and Croux (1993), "Alternatives to the median absolute deviation", JASA 88.

    >>> round(scale(np.array([1.0, 2.0, 3.0, 4.0, 100.0])), 4)  # 2.2219 times the third smallest of ten differences
    2.2219
    """
    first, second = np.triu_indices(len(values), 1)
    half = len(values) // 2 + 1
    return 2.2219 * float(np.sort(np.abs(values[first] - values[second]))[half * (half - 1) // 2 - 1])


def freedom(num: int) -> float:
    """Return the degrees of freedom of the robust scale of ``num`` values."""
    return EFFICIENCY * (num - 1)


def nearest(place: int, num: int) -> list[int]:
    """Return the places 0 to ``num`` - 1 in order of their distance from ``place``, itself first."""
    return sorted(range(num), key=lambda other: abs(other - place))
