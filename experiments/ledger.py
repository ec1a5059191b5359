"""What became of a run: ``status.json`` in its folder, written last, by rename."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments import claims
from experiments.files import read_json, write_json
from gradscope import frames

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
        claims.confirm(folder)
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
