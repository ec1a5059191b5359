"""How far is a sweep?

python -m experiments.status SWEEP [--watch] [--results results/runs]
"""

from __future__ import annotations

import argparse
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

from experiments import claims, launches
from experiments.ledger import DONE, FAILED, Status

RUNNING, MISSING, HALF = "running", "missing", "half done"
SHOWN = 5  # of the slowest, and of the failures
WATCH_SECONDS = 2.0


@dataclass(frozen=True)
class Progress:
    """Runs of a sweep by what became of them.  ``missing``: overrides that were planned and have no folder."""

    done: dict[Path, Status]
    failed: dict[Path, Status]
    running: list[Path]
    half: list[Path]
    missing: list[tuple[str, ...]]

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


def look(sweep: Path) -> Progress:
    """The state of a sweep.

    Raises:
        FileNotFoundError: No such sweep.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(f"There is no sweep {sweep}; sweeps there are: {_others(sweep.parent)}.")
    done: dict[Path, Status] = {}
    failed: dict[Path, Status] = {}
    running, half = list[Path](), list[Path]()
    for folder in launches.folders(sweep):
        status = Status.read(folder)
        if claims.owned(folder):
            running.append(folder)
        elif status is None:
            half.append(folder)
        else:
            (done if status.state == DONE else failed)[folder] = status
    return Progress(done, failed, running, half, launches.missing(sweep))


def report(sweep: Path, progress: Progress) -> Group:
    """Counts, time left, the slowest runs, and failures by their last line."""
    counts = Table(title=str(sweep), title_justify="left")
    for name in (DONE, RUNNING, FAILED, HALF, MISSING, "time left"):
        counts.add_column(name, justify="right")
    parts = (progress.done, progress.running, progress.failed, progress.half, progress.missing)
    seconds = progress.seconds_left
    idle = not progress.running and progress.left
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
    return Group(*shown)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the state of a sweep, once or until it is over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", help="its name below --results, or the path of its folder")
    parser.add_argument("--results", type=Path, default=Path("results/runs"))
    parser.add_argument("--watch", action="store_true", help="every two seconds, until nothing runs")
    options = parser.parse_args(arguments)
    sweep = Path(options.sweep) if Path(options.sweep).is_dir() else options.results / options.sweep
    try:
        progress = look(sweep)
    except FileNotFoundError as error:
        sys.exit(f"Error: {error}")
    console = Console()
    if not options.watch:
        console.print(report(sweep, progress))
        return
    with Live(report(sweep, progress), console=console) as live:
        while progress.running:
            time.sleep(WATCH_SECONDS)
            progress = look(sweep)
            live.update(report(sweep, progress))


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
