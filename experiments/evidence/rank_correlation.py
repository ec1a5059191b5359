"""Rank correlation over a handful of things, tested by every order that they could have had."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from scipy import stats

# n! orders are gone through: of nine things 362 880.
MOST = 9
_ROUNDING = 1e-9


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's ``value``, -1..1, over ``num`` things, and ``p``: the part of all orders that have one as extreme."""

    value: float
    p: float
    num: int


def rank_correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> RankCorrelation:
    """Spearman's rank correlation of x and y (n,) and its exact two-sided p: twice the smaller of the parts of the n!
    pairings whose correlation is at least, or at most, the one found.

    Raises:
        ValueError: Lengths differ, fewer than three or more than nine of them, or all values of one are equal.
    """
    a, b = (tuple(stats.rankdata(np.asarray(values, dtype=np.float64)).tolist()) for values in (x, y))
    if len(a) != len(b) or not 3 <= len(a) <= MOST:
        raise ValueError(f"A rank correlation goes over 3 to {MOST} pairs, got {len(a)} and {len(b)} values.")
    if 1 in (len(set(a)), len(set(b))):
        raise ValueError("A rank correlation needs values that differ, got equal ones.")
    return _of_ranks(a, b)


@cache
def _of_ranks(x: tuple[float, ...], y: tuple[float, ...]) -> RankCorrelation:
    a, b = (np.array(ranks) - np.mean(ranks) for ranks in (x, y))
    orders = np.array(list(itertools.permutations(a)))
    all_values = orders @ b / np.sqrt((a @ a) * (b @ b))
    value = float(all_values[0])  # of the order they are in
    p = 2 * min(np.mean(all_values > value - _ROUNDING), np.mean(all_values < value + _ROUNDING))
    return RankCorrelation(value, min(float(p), 1.0), len(a))
