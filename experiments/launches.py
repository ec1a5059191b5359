"""One start of a sweep: what it set out to do, and a line for each run that came to its end.

The processes of a launch, wherever they run, share the file that the environment names; each appends whole lines.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.files import read_json, write_json
from experiments.records import read

VARIABLE = "GRADSCOPE_LAUNCH"
PLAN = "plan.json"
# Folders in that of a sweep that are none of a run.
NO_RUNS = ("launches", "data", "metrics", "figures", "mlruns")


def begin(sweep: Path, runs: Sequence[Sequence[str]]) -> Path:
    """Note the overrides of every run of a launch beside those of earlier ones, and name its file to all processes."""
    known = read_json(sweep / PLAN) or {"runs": []}
    planned = {tuple(overrides): None for overrides in known["runs"]} | {tuple(overrides): None for overrides in runs}
    write_json(sweep / PLAN, {"runs": [list(overrides) for overrides in planned]})
    path = sweep / "launches" / f"{time.time_ns()}-{os.getpid()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.environ[VARIABLE] = str(path.resolve())
    return path


def end() -> None:
    """The launch is over."""
    os.environ.pop(VARIABLE, None)


def current() -> Path | None:
    """The file of the launch that this process belongs to."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def note(folder: Path, state: str, error: str | None = None) -> None:
    """A run came to its end; one write, which other processes cannot tear."""
    path = current()
    if path is None:
        return
    line = json.dumps({"run": folder.name, "state": state, "error": error}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def ended(path: Path) -> list[dict[str, Any]]:
    """The runs of a launch that came to their end."""
    return read(path)


def stop() -> None:
    """No further run of this launch is to begin."""
    path = current()
    if path is not None:
        path.with_suffix(".stop").touch()


def stopped() -> bool:
    """Whether one of its runs has failed under ``on_error=stop``."""
    path = current()
    return path is not None and path.with_suffix(".stop").exists()


def folders(sweep: Path) -> list[Path]:
    """The folders of runs in that of a sweep, by name; what a killed `collect` left is none."""
    names = {entry.name for entry in os.scandir(sweep) if entry.is_dir() and not entry.name.endswith((".part", ".old"))}
    return [sweep / name for name in sorted(names.difference(NO_RUNS))]


def planned(sweep: Path) -> list[tuple[str, ...]]:
    """The overrides of every run that any launch of a sweep set out to do."""
    return [tuple(overrides) for overrides in (read_json(sweep / PLAN) or {"runs": []})["runs"]]
