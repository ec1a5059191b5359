"""Contestants are timed in turns, so that a temporary slowdown of the machine affects all of them equally."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

# Seconds for the repetitions of one contestant.  If its warm-up alone takes longer, it runs only once.
SECONDS_EACH = 30.0
FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Contestant:
    """A named call.  ``once``: the warm-up is the only run, for calls that take minutes."""

    name: str
    call: Callable[[], Any]
    once: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition of one contestant, and the result of its last run."""

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

    A slow contestant takes part in fewer rounds, spread evenly, but at least 3.  If its warm-up takes more than 30 s or
    it has ``once``, the warm-up is its only measurement.
    """
    gc.collect()
    gc.freeze()  # the garbage collector skips all existing objects, both between runs and during a run
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
    """Seconds and result of one call; garbage of the previous call is collected before the clock starts."""
    gc.collect()
    _wait()
    begin = time.perf_counter()
    result = call()
    _wait()
    return time.perf_counter() - begin, result


def _wait() -> None:
    """Wait until a GPU has done everything that was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
