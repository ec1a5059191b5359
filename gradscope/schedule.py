"""When to measure: every so many steps or at powers of two, within a budget of time."""

from __future__ import annotations

import time
from collections.abc import Callable

Every = int | str


class Schedule:
    """Which steps are due, and which of those the budget allows.

    A kind of measurement ("gsc", "statistics") costs what it cost on average so far.  ``max_overhead``: the part of the
    time since the beginning that measuring may take; a measurement that would exceed it is left out and counted in
    ``skipped``.  The first of each kind is always taken.

    Raises:
        ValueError: A period that is neither a whole number >= 1 nor "log", or a budget outside (0, 1].
    """

    def __init__(
        self, periods: dict[str, Every], max_overhead: float | None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        for name, every in periods.items():
            counted = isinstance(every, int) and not isinstance(every, bool) and every >= 1
            if not (counted or every == "log"):
                raise ValueError(f'monitor.{name} must be a whole number >= 1 or "log", got {every!r}.')
        if max_overhead is not None and not 0 < max_overhead <= 1:
            raise ValueError(f"monitor.max_overhead must be in (0, 1] or None, got {max_overhead!r}.")
        self.periods, self.max_overhead, self.clock = periods, max_overhead, clock
        self.skipped, self.spent = 0, 0.0
        self._costs: dict[str, list[float]] = {}
        self._began = clock()

    def due(self, step: int) -> str | None:
        """The first kind that is due at this step; kinds are listed from the dearest to the cheapest."""
        for name, every in self.periods.items():
            if step & (step - 1) == 0 if every == "log" else step % int(every) == 0:
                return name
        return None

    def allows(self, kind: str) -> bool:
        """Whether one more of this kind keeps to the budget; one that does not is counted as skipped."""
        if self.max_overhead is None or kind not in self._costs:
            return True
        costs = self._costs[kind]
        expected = sum(costs) / len(costs)
        allowed = self.spent + expected <= self.max_overhead * (self.clock() - self._began + expected)
        self.skipped += not allowed
        return allowed

    def took(self, kind: str, seconds: float) -> None:
        """A measurement of this kind took so long."""
        self._costs.setdefault(kind, []).append(seconds)
        self.spent += seconds

    @property
    def overhead(self) -> float:
        """The part of the time since the beginning that measuring took."""
        return self.spent / max(self.clock() - self._began, 1e-12)
