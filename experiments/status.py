"""Progress of a sweep: counts, remaining time, the slowest runs, and errors.

python -m experiments.status sweep=mine
python -m experiments.status sweep=mine --watch
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from experiments import runs
from experiments.archive import collecting
from experiments.config import command_line
from experiments.runs import DONE, FAILED, HALF_DONE, MISSING, RUNNING, Outcome

SHOWN = 5  # of the slowest runs, of the errors, and of the runs that cannot be read
WATCH_SECONDS = 2.0
# Watching takes at most about a tenth of the time.
WATCH_SHARE = 10


@dataclass
class Config:
    """``results``/``sweep`` is the folder of the sweep; a path works too.  ``watch``: update until nothing changes."""

    sweep: str = "measure"
    results: str = "results/runs"
    watch: bool = False


@dataclass(frozen=True)
class Progress:
    """The outcome of each run of a sweep.

    ``unreadable``: done runs that `collect` left out, with the reason, unless they were repeated since.  ``launched``:
    whether a launch is active.
    """

    outcomes: list[Outcome]
    unreadable: dict[str, str]
    launched: bool

    def having(self, *states: str) -> list[Outcome]:
        """The runs in one of these states."""
        return [outcome for outcome in self.outcomes if outcome.state in states]

    @property
    def over(self) -> bool:
        """Whether nothing will change: no run is at work, and no launch has runs left to start."""
        return not self.having(RUNNING) and not (self.launched and self.having(HALF_DONE, MISSING))

    @property
    def left(self) -> int:
        """The number of runs that the same command would execute, without those that are running."""
        return len(self.having(FAILED, HALF_DONE, MISSING))

    @property
    def seconds_left(self) -> float | None:
        """Remaining time, from the mean time of the done runs and the number of running ones."""
        seconds = [outcome.status.seconds for outcome in self.having(DONE) if outcome.status is not None]
        running = len(self.having(RUNNING))
        return statistics.fmean(seconds) * (self.left + running) / max(1, running) if seconds else None


def look(sweep: Path, known: runs.Known | None = None) -> Progress:
    """The progress of a sweep; statuses in ``known`` that have not changed are not read again.

    Raises:
        FileNotFoundError: There is no such sweep.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(f"There is no sweep {sweep}; existing sweeps: {_others(sweep.parent)}.")
    outcomes = runs.states(sweep, known=known)
    changed = {outcome.name: outcome.changed for outcome in outcomes}
    left_out = collecting.unreadable(sweep).items()
    unreadable = {name: why for name, (time_stamp, why) in left_out if changed.get(name) == time_stamp}
    return Progress(outcomes, unreadable, runs.active(sweep))


def report(sweep: Path, progress: Progress) -> Group:
    """Tables of the counts, the slowest runs, the most frequent errors, and the runs that cannot be read."""
    counts = Table(title=str(sweep), title_justify="left")
    for name in (DONE, RUNNING, FAILED, HALF_DONE, MISSING, "time left"):
        counts.add_column(name, justify="right")
    seconds = progress.seconds_left
    idle = progress.left and progress.over
    left = "unknown" if seconds is None else f"{_span(seconds)}{' (nothing runs)' if idle else ''}"
    numbers = (len(progress.having(state)) for state in (DONE, RUNNING, FAILED, HALF_DONE, MISSING))
    counts.add_row(*map(str, numbers), left if progress.left or progress.having(RUNNING) else "none")
    shown: list[Table] = [counts]
    times = sorted(
        ((outcome.status.seconds, outcome.name) for outcome in progress.having(DONE) if outcome.status), reverse=True
    )
    if times:
        slowest = Table("slowest", "time", title_justify="left")
        for took, name in times[:SHOWN]:
            slowest.add_row(name, _span(took))
        shown.append(slowest)
    if failed := progress.having(FAILED):
        failures = Table("runs", "error", "one of them", title_justify="left")
        for error, num in Counter(outcome.error for outcome in failed).most_common(SHOWN):
            failures.add_row(str(num), error, next(outcome.name for outcome in failed if outcome.error == error))
        shown.append(failures)
    if progress.unreadable:
        unreadable = Table("done, but not collected", "why", title_justify="left")
        for name, why in list(progress.unreadable.items())[:SHOWN]:
            unreadable.add_row(name, why)
        if (more := len(progress.unreadable) - SHOWN) > 0:
            unreadable.add_row(f"and {more} more", "")
        shown.append(unreadable)
    return Group(*shown)


def main(cfg: Config) -> None:
    """Print the progress of a sweep, once or until nothing changes."""
    below = Path(cfg.results) / cfg.sweep
    sweep = Path(cfg.sweep) if Path(cfg.sweep).is_dir() and not below.is_dir() else below
    known: runs.Known = {}
    progress = look(sweep, known)
    console = Console(markup=False)
    if not cfg.watch:
        console.print(report(sweep, progress))
        return
    took = 0.0
    with Live(report(sweep, progress), console=console) as live:
        while not progress.over:
            time.sleep(max(WATCH_SECONDS, WATCH_SHARE * took))
            begin = time.perf_counter()
            progress = look(sweep, known)
            live.update(report(sweep, progress))
            took = time.perf_counter() - begin


def _span(seconds: float) -> str:
    """A time in words."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _others(results: Path) -> str:
    names = sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    return ", ".join(names) or "none"


if __name__ == "__main__":
    command_line.run(main, Config, positional="sweep")
