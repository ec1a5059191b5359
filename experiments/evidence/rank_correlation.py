"""Spearman's rank correlation with a permutation test."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

# All n! orders are computed for up to nine pairs (362 880), else RANDOM ones.
MOST, RANDOM = 9, 9999


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ``value`` in -1..1 of ``num`` pairs, and the two-sided ``p``."""

    value: float
    p: float
    num: int


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> RankCorrelation:
    """Spearman's rank correlation of x and y, both (n,), with its two-sided p, which is exact for n of at most nine.

    p is twice the smaller of two proportions of the pairings: those whose correlation is at least the observed one, and
    those whose correlation is at most the observed one.
    """
    a, b = (tuple(stats.rankdata(np.asarray(values, dtype=np.float64)).tolist()) for values in (x, y))
    if len(a) != len(b) or len(a) < 3:
        raise ValueError(f"A rank correlation needs at least 3 pairs, got {len(a)} and {len(b)} values.")
    if 1 in (len(set(a)), len(set(b))):
        raise ValueError("A rank correlation needs values that differ, got equal values of x or of y.")
    return _of_ranks(a, b)


@cache
def _of_ranks(x: tuple[float, ...], y: tuple[float, ...]) -> RankCorrelation:
    # Sums of products of ranks are exact in floating point, so equal correlations compare equal.
    found = stats.permutation_test(
        (np.array(x),), lambda order, axis: (order * np.array(y)).sum(axis=axis), permutation_type="pairings",
        vectorized=True, n_resamples=math.factorial(MOST) if len(x) <= MOST else RANDOM, rng=np.random.default_rng(0),
    )  # fmt: skip
    return RankCorrelation(float(np.corrcoef(x, y)[0, 1]), float(found.pvalue), len(x))
