"""When to measure: every so many steps or at powers of two, within a budget of time."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from statistics import median

Every = int | str

# The step after a record is compared with the median of so many others, and the median of so many differences counts,
# once there are at least so few.
OTHERS, DIFFERENCES, FEWEST = 20, 200, 5


class Schedule:
    """Which steps are due, and which of those the budget allows.

    A kind of measurement ("gsc", "statistics") costs what it cost on average so far: its own time, and by how much the
    step of training after it takes longer than others (the median), for it finds cold caches and memory given back.
    ``max_overhead``: how much longer than by itself training may take since the beginning, as a fraction; a measurement
    that would exceed it is left out and counted in ``skipped``.  The first of each kind is always taken.

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
        self.skipped = 0
        self._looks = 0.0
        self._costs: dict[str, list[float]] = {}
        self._others: deque[float] = deque(maxlen=OTHERS)
        self._longer: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=DIFFERENCES))
        self._left: tuple[str | None, float] | None = None
        self._began = self._arrived = clock()

    def due(self, step: int) -> str | None:
        """The first kind that is due at this step; kinds are listed from the dearest to the cheapest."""
        for name, every in self.periods.items():
            if step & (step - 1) == 0 if every == "log" else step % int(every) == 0:
                return name
        return None

    def arrives(self) -> None:
        """Training has made a step."""
        self._arrived = self.clock()
        if self._left is None:
            return
        (kind, since), self._left = self._left, None
        if kind is None:
            self._others.append(self._arrived - since)
        elif len(self._others) >= FEWEST:
            self._longer[kind].append(self._arrived - since - median(self._others))

    def looked(self) -> None:
        """What is done in every step is done."""
        self._looks += self.clock() - self._arrived

    def allows(self, kind: str) -> bool:
        """Whether one more of this kind keeps to the budget; one that does not is counted as skipped."""
        if self.max_overhead is None or kind not in self._costs:
            return True
        costs = self._costs[kind]
        spent, expected = self.spent, sum(costs) / len(costs) + self._after(kind)
        allowed = spent + expected <= self.max_overhead * (self.clock() - self._began - spent)
        self.skipped += not allowed
        return allowed

    def took(self, kind: str, seconds: float) -> None:
        """A measurement of this kind took so long."""
        self._costs.setdefault(kind, []).append(seconds)

    def leaves(self, kind: str | None) -> None:
        """Training goes on after a measurement of this kind, or none."""
        self._left = kind, self.clock()

    @property
    def spent(self) -> float:
        """Seconds by which training takes longer so far."""
        return self._looks + sum(sum(costs) + len(costs) * self._after(kind) for kind, costs in self._costs.items())

    @property
    def overhead(self) -> float:
        """``spent`` as a fraction of what training takes by itself."""
        return self.spent / max(self.clock() - self._began - self.spent, 1e-12)

    def _after(self, kind: str) -> float:
        """How much longer the step after such a measurement takes, 0 until that is known."""
        longer = self._longer[kind]
        return max(0.0, median(longer)) if len(longer) >= FEWEST else 0.0
