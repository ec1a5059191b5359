"""How far is a sweep?

python -m experiments.status SWEEP [--watch] [--results results/runs]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from experiments.archive import collecting
from experiments.runs import launches, locks
from experiments.runs import names as run_names
from experiments.runs.outcomes import DONE, FAILED, STATUS, Status

RUNNING, MISSING, HALF = "running", "missing", "half done"
SHOWN = 5  # of the slowest, of the failures, and of what cannot be read
WATCH_SECONDS = 2.0
# Watching takes at most about one part in so many of the time.
WATCH_SHARE = 10

# Statuses that were read before, and the time of their file then.
Known = dict[Path, tuple[int, Status | None]]


@dataclass(frozen=True)
class Progress:
    """Runs of a sweep by what became of them.

    ``missing``: overrides that were planned and have no folder.  ``unreadable``: why `collect` left a run out that says
    it is done, as long as the run has not been made again since.  ``launched``: whether a launch is at work.
    """

    done: dict[Path, Status]
    failed: dict[Path, Status]
    running: list[Path]
    half: list[Path]
    missing: list[tuple[str, ...]]
    unreadable: dict[Path, str]
    launched: bool

    @property
    def over(self) -> bool:
        """Whether nothing will change: nothing runs, and no launch has anything left to begin."""
        return not self.running and not (self.launched and (self.half or self.missing))

    @property
    def left(self) -> int:
        """Runs that the same command would still carry out, those of other processes aside."""
        return len(self.failed) + len(self.half) + len(self.missing)

    @property
    def seconds_left(self) -> float | None:
        """What is left, at the mean of the runs that are done, over the processes that are at work."""
        if not self.done:
            return None
        mean = statistics.fmean(status.seconds for status in self.done.values())
        return mean * (self.left + len(self.running)) / max(1, len(self.running))


def look(sweep: Path, known: Known | None = None) -> Progress:
    """The state of a sweep; what ``known`` holds of an earlier look is not read again.

    Raises:
        FileNotFoundError: No such sweep.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(f"There is no sweep {sweep}; sweeps there are: {_others(sweep.parent)}.")
    known = {} if known is None else known
    done: dict[Path, Status] = {}
    failed: dict[Path, Status] = {}
    running, half = list[Path](), list[Path]()
    left_out, unreadable = collecting.unreadable(sweep), dict[Path, str]()
    now = locks.clock(sweep)
    for folder in run_names.folders(sweep):
        changed, locked = _glance(folder)
        if known.get(folder, (-1,))[0] != changed:
            known[folder] = changed, Status.read(folder)
        status = known[folder][1]
        if locked and locks.owned(folder, now):
            running.append(folder)
        elif status is None:
            half.append(folder)
        else:
            (done if status.state == DONE else failed)[folder] = status
            if left_out.get(folder.name, (None,))[0] == changed:
                unreadable[folder] = left_out[folder.name][1]
    return Progress(done, failed, running, half, launches.missing(sweep), unreadable, _launched(sweep, now))


def _glance(folder: Path) -> tuple[int, bool]:
    """When the status of a run changed last, 0 where there is none, and whether there is any lock; in one pass."""
    changed, locked = 0, False
    try:
        for entry in os.scandir(folder):
            if entry.name == STATUS:
                changed = entry.stat().st_mtime_ns
            locked |= entry.name.endswith(".lock")
    except FileNotFoundError:
        pass  # removed in this moment
    return changed, locked


def _launched(sweep: Path, now: float) -> bool:
    """Whether the process of a launch is alive, or its file was touched in the last half minute, from wherever."""
    for path in (sweep / "launches").glob("*.jsonl"):
        number, _, pid = path.stem.partition("-")
        if now - path.stat().st_mtime < locks.PATIENCE_SECONDS:
            return True
        if pid.isdigit() and locks.alive_since(int(pid), int(number) / 1e9):
            return True
    return False


def report(sweep: Path, progress: Progress) -> Group:
    """Counts, time left, the slowest runs, and failures by their last line."""
    counts = Table(title=str(sweep), title_justify="left")
    for name in (DONE, RUNNING, FAILED, HALF, MISSING, "time left"):
        counts.add_column(name, justify="right")
    parts = (progress.done, progress.running, progress.failed, progress.half, progress.missing)
    seconds = progress.seconds_left
    idle = progress.left and progress.over
    left = "unknown" if seconds is None else f"{_span(seconds)}{' (nothing runs)' if idle else ''}"
    counts.add_row(*(str(len(part)) for part in parts), left if progress.left or progress.running else "none")
    shown: list[Table] = [counts]
    if progress.done:
        slowest = Table("slowest", "time", title_justify="left")
        order = sorted(progress.done.items(), key=lambda item: -item[1].seconds)[:SHOWN]
        for folder, status in order:
            slowest.add_row(folder.name, _span(status.seconds))
        shown.append(slowest)
    if progress.failed:
        failures = Table("runs", "error", "one of them", title_justify="left")
        errors = Counter(status.error for status in progress.failed.values())
        for error, num in errors.most_common(SHOWN):
            one = next(folder for folder, status in progress.failed.items() if status.error == error)
            failures.add_row(str(num), error, one.name)
        shown.append(failures)
    if progress.unreadable:
        unreadable = Table("done, but not collected", "why", title_justify="left")
        for folder, why in list(progress.unreadable.items())[:SHOWN]:
            unreadable.add_row(folder.name, why)
        if (more := len(progress.unreadable) - SHOWN) > 0:
            unreadable.add_row(f"and {more} more", "")
        shown.append(unreadable)
    return Group(*shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the state of a sweep, once or until it is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", help="its name below --results, or the path of its folder")
    parser.add_argument("--results", type=Path, default=Path("results/runs"))
    parser.add_argument("--watch", action="store_true", help="until nothing runs and no launch goes on")
    options = parser.parse_args(arguments)
    options.sweep = options.sweep.removeprefix("sweep=")  # as of the other commands
    below = options.results / options.sweep
    sweep = Path(options.sweep) if Path(options.sweep).is_dir() and not below.is_dir() else below
    known: Known = {}
    try:
        progress = look(sweep, known)
    except FileNotFoundError as error:
        sys.exit(f"Error: {error}")
    console = Console(markup=False)
    if not options.watch:
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
    """Seconds in words."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _others(results: Path) -> str:
    names = sorted(path.name for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    return ", ".join(names) or "none"


if __name__ == "__main__":
    main()
