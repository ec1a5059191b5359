"""How each run ended (``status.json``, the last file written into its folder), and the states of a sweep's runs."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.files import read_json, write_json
from experiments.runs import launches, locks, names
from experiments.terminal import PlainConsole
from gradscope import frames

# The states of a run.  Half done: it has a folder, but no status and no process.  Missing: planned, but no folder.
DONE, FAILED, RUNNING, HALF_DONE, MISSING = "done", "failed", "running", "half done", "missing"
# A state that occurs only in the file of a launch: the run was done before the launch.
SKIPPED = "skipped"

STATUS, ERROR = "status.json", "error.txt"
# A finished run has a frame (of a measurement or of a monitor) or the records of training.
FRAMES, METRICS = ("frame.parquet", "monitor.parquet"), "metrics.parquet"
# Expected types of the fields of a status.  They are checked, because a status file may be damaged.
TYPES: dict[str, Any] = {
    "state": str, "overrides": tuple, "files": tuple, "seconds": int | float, "value": int | float | None,
    "error": str | None, "schema": int | float, "finished": str,
}  # fmt: skip
MOST_SECONDS = 1e10  # of a run; sums of more would overflow
SHOWN = 10  # at most this many different errors are printed
NO_STATUS = "ended without a status: the run was killed, or its folder is not writable"


@dataclass(frozen=True)
class Status:
    """How a run ended ("done" or "failed"), its overrides and files, and its value for a search such as Optuna's."""

    state: str
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    seconds: float = 0.0
    value: float | None = None
    error: str | None = None
    schema: int = frames.SCHEMA_VERSION
    finished: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def write(self, folder: Path) -> None:
        """Write the status into the run's folder.  Raises `LostLockError` if another process has taken over the run."""
        locks.confirm(folder)
        write_json(folder / STATUS, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """The status in a run's folder; None if there is none or the file is damaged."""
        content = read_json(folder / STATUS) or {}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        try:
            status = cls(**fields)
        except TypeError:  # unknown or missing fields
            return None
        if not all(isinstance(getattr(status, name), kind) for name, kind in TYPES.items()):
            return None
        sound = status.state in (DONE, FAILED) and 0 <= status.seconds <= MOST_SECONDS
        sound = sound and (status.value is None or not math.isnan(status.value))
        return status if sound and all(isinstance(word, str) for word in status.overrides + status.files) else None


@dataclass(frozen=True)
class Outcome:
    """The state of one run.  ``changed`` is the time stamp of its status in nanoseconds, or 0 without a status."""

    name: str
    digest: str
    state: str
    folder: Path | None = None
    status: Status | None = None
    error: str | None = None
    changed: int = 0

    @property
    def failed(self) -> bool:
        """Whether the run failed, is half done, or could not begin because of an error."""
        return self.state in (FAILED, HALF_DONE) or (self.state == MISSING and self.error is not None)


# Statuses read before, by run folder, each with the time stamp of its file.
Known = dict[Path, tuple[int, Status | None]]


def states(sweep: Path, digests: Collection[str] | None = None, known: Known | None = None) -> list[Outcome]:
    """The outcomes of all runs of a sweep: first of the run folders, by name, then of planned runs without a folder.

    ``digests``: only runs with these digests.  ``known``: statuses read before; statuses read now are added to it.
    """
    if not sweep.is_dir():
        return []
    now, known = locks.clock(sweep), {} if known is None else known
    folders = [(folder, names.digest_of(folder)) for folder in names.folders(sweep)]
    found = [_outcome(folder, key, now, known) for folder, key in folders if digests is None or key in digests]
    begun = {key for _, key in folders}
    return found + [
        Outcome(",".join(words), key, MISSING)
        for key, words in launches.planned(sweep).items()
        if key not in begun and (digests is None or key in digests)
    ]


def _outcome(folder: Path, digest: str, now: float, known: Known) -> Outcome:
    changed = 0
    with contextlib.suppress(OSError):
        changed = (folder / STATUS).stat().st_mtime_ns
    if known.get(folder, (-1,))[0] != changed:
        known[folder] = changed, Status.read(folder) if changed else None
    status = known[folder][1]
    error = None if status is None else status.error
    state = HALF_DONE if status is None else status.state
    if state != DONE and locks.held(folder, now):
        state = RUNNING
    return Outcome(folder.name, digest, state, folder, status, error, changed)


def is_done(folder: Path) -> bool:
    """Whether the status says done, all files of the run exist, and its frame (if any) passes the schema check."""
    return finished(folder) is not None


def finished(folder: Path) -> Status | None:
    """The status of a run that is done (see `is_done`), else None."""
    status = Status.read(folder)
    if status is None or status.state != DONE or not {*FRAMES, METRICS} & {*status.files}:
        return None
    try:
        for name in {*FRAMES} & {*status.files}:
            frames.load(folder / name)
    except Exception:  # whatever makes a frame unreadable, the run must be repeated
        return None
    return status if all((folder / name).is_file() for name in status.files) else None


def outputs(folder: Path) -> tuple[str, ...]:
    """Names of the result files that a run has left directly in its folder."""
    passing = (".part", ".lock", STATUS, ERROR)
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(passing)))


def print_summary(sweep: str, outcomes: Sequence[Outcome], stopped: bool) -> None:
    """Print how the runs of a launch ended, one line per error, and how to continue."""
    counts = Counter(outcome.state for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.failed]
    console = PlainConsole(stderr=True, soft_wrap=True)
    if failed:
        console.print(f"{sweep}: {len(failed)} of {len(outcomes)} runs failed.", style="bold red")
        errors: dict[str, list[str]] = {}
        for outcome in failed:
            errors.setdefault(outcome.error or NO_STATUS, []).append(outcome.name)
        for error, runs in list(errors.items())[:SHOWN]:
            more = f" and {len(runs) - 1} more" if runs[1:] else ""
            console.print(f"  {error}\n    {runs[0]}{more}")
        if len(errors) > SHOWN:
            console.print(f"  and {len(errors) - SHOWN} other errors")
        places = ", ".join(sorted({f"{outcome.folder.parent}/*/{ERROR}" for outcome in failed if outcome.folder}))
        console.print(f"Tracebacks: {places}." if places else "None of them could start.")
        console.print("Run the same command again to repeat the runs that are not done.")
    if stopped:
        console.print("on_error=stop: no runs were started after the first failure.")
    elif missing := sum(outcome.state == MISSING and not outcome.failed for outcome in outcomes):
        console.print(f"{sweep}: {missing} of {len(outcomes)} runs were not started.")
    if counts[RUNNING]:
        console.print(f"{counts[RUNNING]} runs belong to another launch, which is still working on them.")
