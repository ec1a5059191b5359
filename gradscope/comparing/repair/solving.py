"""Find the factor of one scale, from a function that measures the local GSC and the length at a factor.

Let h(t) = ln GSC - ln goal and k(t) = ln rms - ln wished rms, both at the factor exp(t).  GSC comes first:

1. A zero of h is the answer (Brent's method between the nearest two of the `FACTORS` where h has different signs).
2. Without a zero, a minimum of |h| + `WORTH` |t| is sought.  All factors around it whose |h| exceeds the one there by
   at most ``slack`` count as equally good.  Of the `FACTORS` among them, their ends, and a zero of k, the answer
   minimizes |k| + `RELUCTANCE` |t|.

A zero of h counts only if |h| changes there by at least `WORTH` times the change of t.  Otherwise the chance
differences between units of one kind would send their scales to absurd factors.  If neither GSC nor length changes with
the scale, the factor is 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import scipy

# Factors of the scan, the nearest first; a zero between the first of them is found without the others.
FACTORS = (1, 4, 1 / 4, 64, 1 / 64, 1024, 1 / 1024)
# Without an effect up to this factor there is none.  Smaller factors would only show the eps of a normalization.
LARGE = 64
FLAT = 1e-3  # a smaller change of a logarithm counts as none
WORTH, RELUCTANCE = 0.05, 0.1  # change of ln GSC and of ln rms that justifies a change of ln factor by 1
STEP = 0.1  # of ln factor, for a derivative
EXACT, ROUGH = 1e-5, 0.1  # error of ln factor where GSC or rms is solved for, and of a compromise

Measured = tuple[float, float]  # ln GSC and ln rms
Function = Callable[[float], float]
SOLVED, NEAREST, LENGTH, NONE = "goal", "nearest", "length", "no effect"


@dataclass(frozen=True)
class Solution:
    """``log_factor``, and why it was chosen: ``outcome``.

    "goal": GSC is at its goal.  "nearest": GSC changes with the scale, and is as near to the goal as is worth it.
    "length": GSC does not change with the scale, which was set by length.  "no effect": neither of them changes.
    ``evaluations``: number of measurements.
    """

    log_factor: float
    outcome: str
    evaluations: int


def solve(measure: Callable[[float], Measured], goal: float, length: float | None, slack: float) -> Solution:
    """The factor for the logarithm of a goal and of a wished rms, or None; ``slack`` as in the module docstring.

    ``measure`` returns NaN where a factor cannot be measured.

    >>> solution = solve(lambda t: (1 + 2 * t, t), goal=0.0, length=None, slack=0.01)
    >>> round(solution.log_factor, 3), solution.outcome
    (-0.5, 'goal')
    """
    measured = cache(measure)

    def h(t: float) -> float:
        return measured(t)[0] - goal

    def k(t: float) -> float:
        return 0.0 if length is None else measured(t)[1] - length

    def done(t: float, outcome: str) -> Solution:
        return Solution(t, outcome, measured.cache_info().currsize)

    points = [0.0]
    for factor in FACTORS[1:]:
        t = math.log(factor)
        if math.isnan(h(t)):
            continue
        points = sorted([*points, t])
        if factor == LARGE and all(_flat(f, [0.0, math.log(4), t]) for f in (h, lambda t: measured(t)[1])):
            return done(0.0, NONE)
        zero = None if _flat(h, points) else _zero(h, points)
        if zero is not None and abs(h(zero + STEP) - h(zero)) >= WORTH * STEP:
            return done(zero, SOLVED)
    flat = _flat(h, points)
    best = 0.0 if flat else _minimum(lambda t: abs(h(t)) + WORTH * abs(t), points)
    points = sorted({*points, best})
    allowed = points if flat else _around(lambda t: abs(h(t)) - abs(h(best)) - slack, best, points)
    if (zero := _zero(k, allowed)) is not None:
        allowed = sorted({*allowed, zero})
    final = min(allowed, key=lambda t: abs(k(t)) + RELUCTANCE * abs(t))
    return done(final, LENGTH if flat else NEAREST)


def _flat(f: Function, points: Sequence[float]) -> bool:
    """Whether f is the same at all points."""
    values = [f(t) for t in points]
    return max(values) - min(values) < FLAT


def _zero(f: Function, points: Sequence[float]) -> float | None:
    """The zero of f between the two neighbors nearest to 0 where f has different signs; None if there are none."""
    pairs = [pair for pair in pairwise(points) if f(pair[0]) * f(pair[1]) <= 0]
    pair = min(pairs, key=lambda pair: max(map(abs, pair)), default=None)
    return None if pair is None else float(scipy.optimize.brentq(f, *pair, xtol=EXACT))


def _minimum(f: Function, points: Sequence[float]) -> float:
    """Where f is smallest: the best of the points, or a better place between it and its neighbors."""
    place = min(range(len(points)), key=lambda place: f(points[place]))
    low, high = points[max(place - 1, 0)], points[min(place + 1, len(points) - 1)]
    if high - low < ROUGH:
        return points[place]
    found = float(scipy.optimize.minimize_scalar(f, bounds=(low, high), method="bounded", options={"xatol": ROUGH}).x)
    return found if f(found) < f(points[place]) - FLAT else points[place]


def _around(excess: Function, best: float, points: Sequence[float]) -> list[float]:
    """The interval around ``best`` in which ``excess`` is not positive: its ends, and the points inside, sorted."""
    inside = [best]
    for side in ([t for t in points if t > best], [t for t in reversed(points) if t < best]):
        last = best
        for t in side:
            if excess(t) > 0:
                inside.append(float(scipy.optimize.brentq(excess, last, t, xtol=EXACT)))
                break
            inside.append(last := t)
    return sorted(set(inside))
