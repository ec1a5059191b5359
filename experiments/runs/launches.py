"""One launch of a sweep: the plan of its runs, and a file with one line for each run that has ended.

The progress bar and the summary read these lines.  The states of planned runs are read from the folders of the runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, flag_override

from experiments.files import SWEEP, read_json, write_json
from experiments.program import end_with
from experiments.runs.locks import PATIENCE_SECONDS, clock
from experiments.runs.names import LAUNCHES
from experiments.runs.origin import COMMAND, command

VARIABLE = "GRADSCOPE_LAUNCH"
_begun_here: set[Path] = set()  # the launches that this process has begun


def new(sweep: Path, config: DictConfig) -> Path:
    """The path of the file for a launch that starts now.  This path and the command line are passed on to all runs.

    The configuration carries the path, because a worker process does not always inherit the environment.
    """
    launch = sweep.resolve() / LAUNCHES / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.jsonl"
    _begun_here.add(launch)
    words = str(launch).replace("\\", "\\\\").replace("'", "\\'")
    with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
        config.hydra.overrides.hydra.append(f"++hydra.job.env_set.{VARIABLE}='{words}'")
    os.environ.pop(COMMAND, None)
    os.environ[COMMAND] = command()
    return launch


def begin(launch: Path, sweep: Path, runs: Mapping[str, Sequence[str]]) -> None:
    """Write the plan of a launch: a mapping from the digest of each run's configuration to the run's overrides."""
    try:
        write_json(sweep / LAUNCHES / f"{launch.stem}.plan.json", {"runs": runs})
        launch.parent.mkdir(parents=True, exist_ok=True)
        launch.touch()
    except OSError as error:
        sys.exit(f"cannot write to {sweep}: {error.strerror}")


def current() -> Path | None:
    """The file of the launch to which the run in this process belongs; None outside of a launch."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def active(sweep: Path) -> bool:
    """Whether a launch of the sweep is alive: every living launch has touched its file in the last half minute."""
    now = clock(sweep)
    times = []
    for path in (sweep / LAUNCHES).glob("*.jsonl"):
        with contextlib.suppress(OSError):  # a link to nothing, or removed meanwhile
            times.append(path.stat().st_mtime)
    return any(abs(now - time) < PATIENCE_SECONDS for time in times)


def note(folder: Path, state: str, error: str | None = None, launch: Path | None = None) -> None:
    """Append one line for a run that has ended to the file of a launch (default: the current one), atomically."""
    path = launch or current()
    if path is None:
        return
    line = json.dumps({"run": folder.name, "state": state, "error": error}) + "\n"
    with contextlib.suppress(OSError):  # if the disk is full, only this line is lost
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def ended(path: Path) -> list[dict[str, Any]]:
    """One entry for each run of a launch that has ended.  Lines cut short by a full disk or a crash are skipped."""
    runs = []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.keys() >= {"run", "state", "error"}:
                runs.append(entry)
    return runs


def stop() -> None:
    """Tell the current launch to start no further runs."""
    path = current()
    if path is not None:
        with contextlib.suppress(OSError):
            path.with_suffix(".stop").touch()


def stopped(launch: Path | None = None) -> bool:
    """Whether a run of a launch (default: the current one) has failed under ``on_error=stop``."""
    path = launch or current()
    return path is not None and path.with_suffix(".stop").exists()


def planned(sweep: Path) -> dict[str, tuple[str, ...]]:
    """The overrides of every planned run of a sweep, by digest.  Of several plans for a run, the first counts."""
    paths = sorted((sweep / LAUNCHES).glob("*.plan.json"), reverse=True)
    found = [(read_json(path, SWEEP) or {}).get("runs") for path in paths]
    return {
        digest: tuple(words) for runs in found if isinstance(runs, dict) for digest, words in runs.items()
        if isinstance(words, list) and all(isinstance(word, str) for word in words)
    }  # fmt: skip


@cache
def follow(parent: int | None = None) -> None:
    """In a worker process: exit soon after ``parent`` (default: the current parent) ends, which unlocks the run."""
    launch = current()
    if parent is None and (launch is None or launch in _begun_here):
        return
    end_with(parent or os.getppid())
