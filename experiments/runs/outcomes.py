"""What became of a run: ``status.json`` in its folder, written last, by rename."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.files import read_json, write_json
from experiments.runs import locks
from gradscope import frames

# Without a status, though begun; and without a folder.
TORN, MISSING = "half done", "not begun"
SHOWN = 10  # different errors
NO_WORDS = "ended without a status: killed, or its folder cannot be written"
ERROR = "error.txt"


STATUS = "status.json"
DONE, FAILED, SKIPPED, BUSY = "done", "failed", "skipped", "busy"
# The frames that a finished run has one of: of a measurement, or of a training run that was watched.
FRAMES = ("frame.parquet", "monitor.parquet")
# The records of one that was a training run.
METRICS = "metrics.parquet"


@dataclass(frozen=True)
class Status:
    """``state``: "done" or "failed".  ``overrides``: what tells the run apart in its sweep; ``files``: what it wrote;
    ``value``: what a sweeper that searches is told."""

    state: str
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    seconds: float = 0.0
    value: float | None = None
    error: str | None = None
    schema: int = frames.SCHEMA_VERSION
    finished: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def write(self, folder: Path) -> None:
        """Into the run's folder.

        Raises:
            LostClaimError: This process held the run and lost it to another, which says what becomes of it.
        """
        locks.confirm(folder)
        write_json(folder / STATUS, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """Of a run's folder; None where there is none, or it is torn or of another make."""
        content = read_json(folder / STATUS)
        if content is None:
            return None
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
        try:
            status = cls(**fields)
        except TypeError:  # a field of another make
            return None
        return status if status._sound() else None

    def _sound(self) -> bool:
        """Whether every field is of its type; a file may hold anything."""
        words = (self.overrides, self.files)
        return (
            all(isinstance(one, tuple) and all(isinstance(word, str) for word in one) for one in words)
            and all(isinstance(one, str) for one in (self.state, self.finished))
            and all(isinstance(one, (int, float)) for one in (self.seconds, self.schema))
            and (self.value is None or isinstance(self.value, (int, float)))
            and (self.error is None or isinstance(self.error, str))
        )


def is_done(folder: Path) -> bool:
    """Whether the run says so, what it measured and everything else that it wrote is there, and its frame passes the
    check of the schema."""
    return finished(folder) is not None


def finished(folder: Path) -> Status | None:
    """The status of a run that `is_done`, else None."""
    status = Status.read(folder)
    if status is None or status.state != DONE or not {*FRAMES, METRICS} & {*status.files}:
        return None
    if not all((folder / name).is_file() for name in status.files):
        return None
    try:
        for name in status.files:
            if name in FRAMES:
                frames.load(folder / name)
    except Exception:  # whatever makes a frame unreadable, the run is to be made again
        return None
    return status


def outputs(folder: Path) -> tuple[str, ...]:
    """Files that a run has left in its folder itself, by name."""
    passing = (".part", ".lock", STATUS, "error.txt")
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(passing)))


@dataclass(frozen=True)
class Outcome:
    """What has become of a run: a state of `experiments.runs.outcomes`, or one of the two above."""

    name: str
    folder: Path | None
    state: str
    error: str | None = None

    @property
    def failed(self) -> bool:
        """Whether it was begun and is neither done nor at work."""
        return self.state in (FAILED, TORN) or (self.state == MISSING and self.error is not None)


def closing(sweep: Path, outcomes: Sequence[Outcome], stopped: bool) -> None:
    """Print how the runs of a launch ended, those that failed with their last line, and how to go on."""
    counts = Counter(outcome.state for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.failed]
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    if failed:
        console.print(f"{sweep.name}: {len(failed)} of {len(outcomes)} runs failed.", style="bold red")
        errors: dict[str, list[str]] = {}
        for outcome in failed:
            errors.setdefault(outcome.error or NO_WORDS, []).append(outcome.name)
        for error, names in list(errors.items())[:SHOWN]:
            more = f" and {len(names) - 1} more" if names[1:] else ""
            console.print(f"  {error}\n    {names[0]}{more}")
        if len(errors) > SHOWN:
            console.print(f"  and {len(errors) - SHOWN} other errors")
        places = ", ".join(sorted({f"{outcome.folder.parent}/*/{ERROR}" for outcome in failed if outcome.folder}))
        console.print(f"Tracebacks: {places}." if places else "None of them could be begun.")
        console.print("The same command runs those again that are not done.")
    if stopped:
        console.print("on_error=stop: the runs after the first failure were not begun.")
    elif left := sum(outcome.state == MISSING and not outcome.failed for outcome in outcomes):
        console.print(f"{sweep.name}: {left} of {len(outcomes)} runs were not begun.")
    if counts[BUSY]:
        console.print(f"{counts[BUSY]} runs were left to another launch that works on them.")
