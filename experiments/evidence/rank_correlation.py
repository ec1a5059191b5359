"""Spearman's rank correlation of a few pairs, with an exact permutation test."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

# All n! orders are computed: 362 880 for nine pairs.
MOST = 9
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ``value`` in -1..1 of ``num`` pairs, and the exact two-sided ``p``."""

    value: float
    p: float
    num: int


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> RankCorrelation:
    """Spearman's rank correlation of x and y, both (n,), with its exact two-sided p.

    p is twice the smaller of two proportions of the n! pairings: those whose correlation is at least the observed one,
    and those whose correlation is at most the observed one.

    Raises:
        ValueError: The lengths differ, are below three or above nine, or all values of x or of y are equal.
    """
    a, b = (tuple(stats.rankdata(np.asarray(values, dtype=np.float64)).tolist()) for values in (x, y))
    if len(a) != len(b) or not 3 <= len(a) <= MOST:
        raise ValueError(f"A rank correlation needs 3 to {MOST} pairs, got {len(a)} and {len(b)} values.")
    if 1 in (len(set(a)), len(set(b))):
        raise ValueError("A rank correlation needs values that differ, got equal values of x or of y.")
    return _of_ranks(a, b)


@cache
def _of_ranks(x: tuple[float, ...], y: tuple[float, ...]) -> RankCorrelation:
    a, b = (np.array(ranks) - np.mean(ranks) for ranks in (x, y))
    orders = np.array(list(itertools.permutations(a)))
    all_values = orders @ b / np.sqrt((a @ a) * (b @ b))
    value = float(all_values[0])  # of the observed order
    p = 2 * min(np.mean(all_values > value - _ROUNDING), np.mean(all_values < value + _ROUNDING))
    return RankCorrelation(value, min(float(p), 1.0), len(a))
