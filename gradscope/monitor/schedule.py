"""When to measure: every n-th step or at powers of two, within a time budget, but at least 20 times in a run."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from statistics import median
from typing import Annotated

from gradscope.choices import Range

Every = Annotated[int | str, Range('a whole number >= 1 or "log"', lambda n: n == "log" or (n is not True and n >= 1))]

# OTHERS: how many ordinary steps the running median covers.  DIFFERENCES: how many delays after records are kept.
# FEWEST: how many values a median needs before it is used.
OTHERS, DIFFERENCES, FEWEST = 20, 200, 5
# FLOOR: records of a run that are taken regardless of the budget.  If the length of the run is unknown, these are the
# first ones, and later one whenever WAIT of all steps so far would pass without a record.
FLOOR, WAIT = 20, 1 / 6


class Schedule:
    """Decides at which steps to measure, and skips measurements that exceed the budget.

    The expected cost of a measurement is the mean time of its kind so far, plus the median delay of the next training
    step (cold caches, released memory).  ``max_overhead``: largest extra time since the start, as a fraction of the
    training time.  A measurement that would exceed this limit is skipped and counted in ``skipped``, unless a run of
    ``total_steps`` (None: unknown) would have fewer than `FLOOR` records of this kind without it.
    """

    def __init__(
        self,
        periods: dict[str, Every],
        max_overhead: float | None,
        clock: Callable[[], float] = time.perf_counter,
        total_steps: int | None = None,
    ) -> None:
        self.periods, self.max_overhead, self.clock = periods, max_overhead, clock
        self.total_steps, self.skipped = total_steps, 0
        self._last: dict[str, int] = {}  # the step of the last measurement of each kind
        self._checks = 0.0
        self._costs: dict[str, tuple[int, float]] = {}  # number and seconds of the measurements of each kind
        self._others: deque[float] = deque(maxlen=OTHERS)
        self._longer: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=DIFFERENCES))
        self._left: tuple[str | None, float] | None = None
        self._began = self._arrived = clock()

    def due(self, step: int) -> str | None:
        """Return the kind scheduled at this step, or None; of several, the most expensive (first in ``periods``)."""
        for name, every in self.periods.items():
            if step & (step - 1) == 0 if every == "log" else step % int(every) == 0:
                return name
        return None

    def arrives(self) -> None:
        """Must be called when a training step is finished."""
        self._arrived = self.clock()
        if self._left is None:
            return
        (kind, since), self._left = self._left, None
        if kind is None:
            self._others.append(self._arrived - since)
        elif len(self._others) >= FEWEST:
            self._longer[kind].append(self._arrived - since - median(self._others))

    def checked(self) -> None:
        """Must be called when the work that the monitor does at every step is finished."""
        self._checks += self.clock() - self._arrived

    def allows(self, kind: str, step: int) -> bool:
        """Whether to take the measurement of this kind at this step; if not, it counts as skipped."""
        if self.max_overhead is None or self._needed(kind, step):
            return True
        number, seconds = self._costs[kind]
        spent, expected = self.spent, seconds / number + self._after(kind)
        allowed = spent + expected <= self.max_overhead * (self.clock() - self._began - spent)
        self.skipped += not allowed
        return allowed

    def _needed(self, kind: str, step: int) -> bool:
        """Whether too many steps would pass from the last measurement to the next scheduled one."""
        every = self.periods[kind]
        if kind not in self._last or every == "log":  # powers of two are few by themselves
            return True
        period = int(every)
        if self.total_steps is not None:
            longest = self.total_steps / FLOOR
        else:
            longest = WAIT * step if step >= FLOOR * period else 0.0
        return step + period - self._last[kind] > longest

    def took(self, kind: str, seconds: float, step: int) -> None:
        """Add the time of a measurement of this kind at this step."""
        self._last[kind] = step
        number, total = self._costs.get(kind, (0, 0.0))
        self._costs[kind] = number + 1, total + seconds

    def leaves(self, kind: str | None) -> None:
        """Must be called just before training continues; ``kind`` is the measurement just taken, or None."""
        self._left = kind, self.clock()

    @property
    def taken(self) -> int:
        """Number of measurements so far."""
        return sum(number for number, _ in self._costs.values())

    @property
    def thinning(self) -> str:
        """Sentences that say how many records the budget has left, and what would leave more; empty if all are left."""
        if not self.skipped:
            return ""
        return (
            f"The monitor took {self.taken} of {self.taken + self.skipped} scheduled records; the others would have "
            f"exceeded max_overhead={self.max_overhead:g}. For more records, raise max_overhead, or make records less "
            "expensive: fewer samples in data, or fewer probes."
        )

    @property
    def spent(self) -> float:
        """Seconds that the monitor has cost so far."""
        return self._checks + sum(total + number * self._after(kind) for kind, (number, total) in self._costs.items())

    @property
    def overhead(self) -> float:
        """``spent`` as a fraction of the training time."""
        return self.spent / max(self.clock() - self._began - self.spent, 1e-12)

    def _after(self, kind: str) -> float:
        """Delay of the step after a measurement of this kind; 0 until the delay is known."""
        longer = self._longer[kind]
        return max(0.0, median(longer)) if len(longer) >= FEWEST else 0.0
