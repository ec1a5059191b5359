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

from rich.console import Group
from rich.live import Live
from rich.table import Table

from experiments import runs
from experiments.archive import collecting
from experiments.config import command_line
from experiments.runs import DONE, FAILED, HALF_DONE, MISSING, RUNNING, Outcome
from experiments.terminal import PlainConsole

MOST_LETTERS = 500  # of one cell
SHOWN = 5  # largest number of rows in the tables of slowest runs, errors, and unreadable runs
WATCH_SECONDS, WATCH_SHARE = 2.0, 10  # with --watch, reading takes at most about a tenth of the time
STATES = (DONE, RUNNING, FAILED, HALF_DONE, MISSING)


@dataclass
class Config:
    """The sweep's folder is ``results``/``sweep`` or else ``sweep``.  With ``watch``, update until nothing changes."""

    sweep: str = "measure"
    results: str = "results/runs"
    watch: bool = False


@dataclass(frozen=True)
class Progress:
    """The outcomes of a sweep's runs, the reasons why done runs were not collected, and whether a launch is active."""

    outcomes: list[Outcome]
    unreadable: dict[str, str]
    launched: bool

    def having(self, *states: str) -> list[Outcome]:
        """The runs in one of these states."""
        return [outcome for outcome in self.outcomes if outcome.state in states]

    @property
    def over(self) -> bool:
        """Whether nothing will change: no process executes a run, and no launch has runs left to start."""
        return not self.having(RUNNING) and not (self.launched and self.having(HALF_DONE, MISSING))

    @property
    def left(self) -> int:
        """The number of runs that are neither done nor running; the same command would execute these runs."""
        return len(self.having(FAILED, HALF_DONE, MISSING))

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the remaining time, from the mean time of the done runs and the number of running ones."""
        seconds = [outcome.status.seconds for outcome in self.having(DONE) if outcome.status is not None]
        running = len(self.having(RUNNING))
        return statistics.fmean(seconds) * (self.left + running) / max(1, running) if seconds else None


def look(sweep: Path, known: runs.Known | None = None) -> Progress:
    """The progress of a sweep; statuses in ``known`` that have not changed are not read again."""
    if not sweep.is_dir():
        others = sorted(path.name for path in sweep.parent.glob("*") if path.is_dir())
        raise FileNotFoundError(f"There is no sweep {sweep}; existing sweeps: {', '.join(others) or 'none'}.")
    outcomes = runs.states(sweep, known=known)
    changed = {outcome.name: outcome.changed for outcome in outcomes}
    left_out = collecting.unreadable(sweep).items()  # by the last `collect`; a run may have been repeated since
    unreadable = {name: why for name, (time_stamp, why) in left_out if changed.get(name) == time_stamp}
    return Progress(outcomes, unreadable, runs.active(sweep))


def report(sweep: Path, progress: Progress) -> Group:
    """Tables of the counts, the slowest runs, the most frequent errors, and the runs that cannot be read."""
    counts = Table(title=str(sweep), title_justify="left")
    for name in (*STATES, "time left"):
        counts.add_column(name, justify="right")
    seconds = progress.seconds_left
    idle = progress.left and progress.over
    left = "unknown" if seconds is None else f"{_span(seconds)}{' (nothing runs)' if idle else ''}"
    numbers = (len(progress.having(state)) for state in STATES)
    counts.add_row(*map(str, numbers), left if progress.left or progress.having(RUNNING) else "none")
    times = [(outcome.status.seconds, outcome.name) for outcome in progress.having(DONE) if outcome.status]
    failed = {outcome.error: outcome.name for outcome in progress.having(FAILED)[::-1]}
    errors = Counter(outcome.error for outcome in progress.having(FAILED)).most_common(SHOWN)
    unread = list(progress.unreadable.items())
    more = len(unread) - SHOWN
    tables: dict[tuple[str, ...], list[tuple[str | None, ...]]] = {
        ("slowest", "time"): [(name, _span(took)) for took, name in sorted(times, reverse=True)[:SHOWN]],
        ("runs", "error", "one of them"): [(str(num), error, failed[error]) for error, num in errors],
        ("done, but not collected", "why"): [*unread[:SHOWN], *([(f"and {more} more", "")] if more > 0 else [])],
    }
    shown = [counts]
    for titles, rows in tables.items():
        if rows:
            shown.append(Table(*titles, title_justify="left"))
        for row in rows:
            shown[-1].add_row(*(cell and cell[:MOST_LETTERS] for cell in row))
    return Group(*shown)


def main(cfg: Config) -> None:
    """Print the progress of a sweep, once or until nothing changes."""
    below = Path(cfg.results) / cfg.sweep
    sweep = Path(cfg.sweep) if Path(cfg.sweep).is_dir() and not below.is_dir() else below
    known: runs.Known = {}
    progress = look(sweep, known)
    console = PlainConsole(highlight=True)
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


if __name__ == "__main__":
    command_line.run(main, Config, positional="sweep")
