"""A stream of batches, merged one by one until the error, a budget, the end or Ctrl-C; then merged over all ranks."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradscope.coefficients.pairs import Pairs
from gradscope.distributed import gathered

# The spread over batches is used from here on.
MIN_BATCHES, MIN_SAMPLES = 3, 30


@dataclass(frozen=True)
class Budget:
    """When to stop: at a relative standard error ``rtol`` of every value, or after a number of samples or seconds."""

    rtol: float | None = None
    max_samples: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise ValueError(f"rtol is a relative standard error between 0 and 1, such as 0.02; got {self.rtol!r}.")
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples!r}.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ValueError(f"max_seconds must be positive, got {self.max_seconds!r}.")


def probe_error(pairs: Pairs) -> float:
    """The largest relative standard error of all pairs that is due to probes; inf if it is unknown."""
    return _largest(pairs, pairs.spread("log10_stderr_probe"))


def relative_error(pairs: Pairs) -> float:
    """The largest relative standard error of all pairs, due to probes and samples; inf if it is unknown."""
    return _largest(pairs, np.hypot(pairs.spread("log10_stderr_probe"), pairs.spread("log10_stderr_sample")))


def _largest(pairs: Pairs, log10_stderr: npt.NDArray[np.float64]) -> float:
    measured = ~np.isnan(pairs.spread("log10_values"))
    return float(np.nan_to_num(log10_stderr[measured], nan=math.inf).max(initial=0.0)) * math.log(10)


def accumulate(batches: Iterable[Any], measure: Callable[[Any], Pairs], budget: Budget) -> tuple[Pairs, str]:
    """Measure and merge batches, over all ranks of ``torch.distributed``; returns the result and why it stopped.

    The reasons: "end of data", "rtol reached", "max_samples", "max_seconds", "interrupted".  An interrupt (Ctrl-C)
    after the first batch keeps the result so far, with a warning; a stream that ends before ``rtol`` warns, too.

    Raises:
        ValueError: No batch at all, or batches that cannot be merged.
    """
    found: Pairs | None = None
    began, reason = time.monotonic(), "end of data"
    try:
        for batch in batches:
            measured = measure(batch)
            found = measured if found is None else found.merge(measured)
            if stop := _stop(found, budget, time.monotonic() - began):
                reason = stop
                break
    except KeyboardInterrupt:
        if found is None:
            raise
        reason = "interrupted"
        warnings.warn(
            f"Interrupted: the result holds the {found.num_batches} batches measured so far and is marked incomplete.",
            stacklevel=4,
        )
    found, reason = _over_ranks(found, reason)
    if found is None:
        raise ValueError("data yields no batch: an exhausted iterator, or an empty loader?")
    if reason != "interrupted":
        warn_if_missed(budget, relative_error(found), reason, found)
    return found, reason


def warn_if_missed(budget: Budget, error: float, reason: str, found: Pairs) -> None:
    """Warn if ``rtol`` was not reached, with the error that was."""
    if budget.rtol is not None and error > budget.rtol:
        warnings.warn(
            f"rtol of {budget.rtol:g} was not reached, because of {reason!r}: the largest relative standard "
            f"error is {error:.2g} after {found.num_samples} samples.",
            stacklevel=5,
        )


def _stop(found: Pairs, budget: Budget, seconds: float) -> str:
    enough = found.num_batches >= MIN_BATCHES and found.num_samples >= MIN_SAMPLES
    if budget.rtol is not None and enough and relative_error(found) <= budget.rtol:
        return "rtol reached"
    if budget.max_samples is not None and found.num_samples >= budget.max_samples:
        return "max_samples"
    if budget.max_seconds is not None and seconds >= budget.max_seconds:
        return "max_seconds"
    return ""


def _over_ranks(found: Pairs | None, reason: str) -> tuple[Pairs | None, str]:
    """The merged result of all ranks, in the order of the ranks, so that each rank gets the same bits."""
    parts = gathered((found, reason))
    merged: Pairs | None = None
    for part, _ in parts:
        merged = part if merged is None else merged if part is None else merged.merge(part)
    return merged, ", ".join(sorted({why for _, why in parts}))
