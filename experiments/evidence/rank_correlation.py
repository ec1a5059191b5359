"""Spearman's rank correlation with a permutation test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

# Up to MOST pairs, the test uses all n! orders (362 880 for nine pairs); for more pairs, RANDOM random orders.
MOST, RANDOM = 9, 9999


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rank correlation of ``num`` pairs: its ``value`` in -1..1, and the two-sided p-value ``p``."""

    value: float
    p: float
    num: int


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> RankCorrelation:
    """Spearman's rank correlation of x and y, both of shape (n,), with its two-sided p-value (exact up to n = 9).

    The p-value is twice the smaller of two proportions: pairings with at least the observed correlation, and pairings
    with at most the observed correlation.
    """
    a, b = (tuple(stats.rankdata(np.asarray(values, dtype=np.float64)).tolist()) for values in (x, y))
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(f"A rank correlation needs at least 3 pairs, got {len(a)} and {len(b)} values.")
    if 1 in (len(set(a)), len(set(b))):
        raise ValueError("A rank correlation needs values that differ, got equal values of x or of y.")
    return _of_ranks(a, b)


@cache
def _of_ranks(x: tuple[float, ...], y: tuple[float, ...]) -> RankCorrelation:
    # Sums of products of ranks have no rounding error, so equal correlations compare equal.
    found = stats.permutation_test(
        (np.array(x),), lambda order, axis: (order * np.array(y)).sum(axis=axis), permutation_type="pairings",
        vectorized=True, n_resamples=math.factorial(MOST) if len(x) <= MOST else RANDOM, rng=np.random.default_rng(0),
    )  # fmt: skip
    return RankCorrelation(float(np.corrcoef(x, y)[0, 1]), float(found.pvalue), len(x))
