"""What became of a run: ``status.json`` in its folder, written last, by rename."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
        """Into the run's folder."""
        write_json(folder / STATUS, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Status | None:
        """Of a run's folder; None where there is none, or it is torn or of another make."""
        content = read_json(folder / STATUS)
        try:
            return None if content is None else cls(**{k: _tuple(v) for k, v in content.items()})
        except TypeError:
            return None


def is_done(folder: Path) -> bool:
    """Whether the run says so, everything that it wrote is there, and its frame passes the check of the schema."""
    status = Status.read(folder)
    if status is None or status.state != DONE or not all((folder / name).is_file() for name in status.files):
        return False
    try:
        for name in status.files:
            if name in FRAMES:
                frames.load(folder / name)
    except Exception:  # whatever makes a frame unreadable, the run is to be made again
        return False
    return True


def outputs(folder: Path) -> tuple[str, ...]:
    """Files that a run has left in its folder itself, by name."""
    passing = (".part", ".lock", STATUS, "error.txt")
    return tuple(sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith(passing)))


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
