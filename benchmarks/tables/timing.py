"""Contestants that do the same work are timed side by side: one warm-up each, then round robin, so that a machine that
slows down for a while slows all of them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# A contestant gets about so many seconds for its repetitions; one whose warm-up alone takes longer runs only once.
SECONDS_EACH = 30.0
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Contestant:
    """A named call.  ``once``: its warm-up is its only run, for what takes minutes."""

    name: str
    call: Callable[[], Any]
    once: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition of one contestant, and what its last run returned."""

    seconds: tuple[float, ...]
    result: Any = None

    @property
    def median(self) -> float:
        """Median of the repetitions, in seconds."""
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the repetitions, in seconds."""
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


def race(contestants: Sequence[Contestant], repeats: int) -> dict[str, Times]:
    """Time all contestants in ``repeats`` interleaved rounds, after one warm-up each.

    A slow contestant takes part in fewer rounds, at least 3, spread evenly; one whose warm-up takes more than 30 s, or
    that asks for it, in none: then the warm-up is what counts.
    """
    gc.collect()
    gc.freeze()  # what exists already is not searched again, neither before a run nor within one
    seconds: dict[str, list[float]] = {}
    results: dict[str, Any] = {}
    rounds: dict[str, int] = {}
    for contestant in contestants:
        warm_up, results[contestant.name] = _timed(contestant.call)
        once = contestant.once or warm_up > SECONDS_EACH
        affordable = max(FEWEST_ROUNDS, int(SECONDS_EACH / warm_up))
        rounds[contestant.name] = 0 if once else min(repeats, affordable)
        seconds[contestant.name] = [warm_up] if once else []
    for number in range(1, repeats + 1):
        for contestant in contestants:
            share = rounds[contestant.name]
            if number * share // repeats > (number - 1) * share // repeats:
                elapsed, results[contestant.name] = _timed(contestant.call)
                seconds[contestant.name].append(elapsed)
    gc.unfreeze()
    return {name: Times(tuple(values), results[name]) for name, values in seconds.items()}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned; garbage of the one before is collected outside the clock."""
    gc.collect()
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result
