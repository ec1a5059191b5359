"""One start of a sweep: what it set out to do, and a line for each run that came to its end.

The lines are for the progress bar; what became of a run is said by its folder alone.  The processes of a launch,
wherever they run, learn its file from the configuration, and each appends whole lines.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, flag_override

from experiments.files import read_json, write_json
from experiments.runs.names import FOLDER, digests, of_digest

ON_ERROR = ("continue", "stop")
WATCH_SECONDS = 1.0


VARIABLE = "GRADSCOPE_LAUNCH"


def new(sweep: Path) -> Path:
    """The file of a launch that begins now in this process."""
    return sweep.resolve() / FOLDER / f"{time.time_ns()}-{os.getpid()}.jsonl"


def begin(launch: Path, sweep: Path, runs: Mapping[str, Sequence[str]]) -> None:
    """Write down what a launch sets out to do in a sweep: overrides by the digest of the run's configuration.

    Raises:
        OSError: The folder of the sweep cannot be written.
    """
    content = {"runs": {digest: list(overrides) for digest, overrides in runs.items()}}
    write_json(sweep / FOLDER / f"{launch.stem}.plan.json", content)
    launch.parent.mkdir(parents=True, exist_ok=True)
    launch.touch()


def hand_over(config: DictConfig, launch: Path) -> None:
    """Name a launch to all of its runs, through the configuration that launchers send: a worker need not inherit the
    environment of the process that launches."""
    words = str(launch).replace("\\", "\\\\").replace("'", "\\'")
    with flag_override(config.hydra, ["struct", "readonly"], [False, False]):
        config.hydra.overrides.hydra.append(f"++hydra.job.env_set.{VARIABLE}='{words}'")


def current() -> Path | None:
    """The file of the launch that the run of this process belongs to."""
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def launcher(launch: Path) -> int:
    """The process that launched."""
    return int(launch.stem.rpartition("-")[2])


def note(folder: Path, state: str, error: str | None = None, launch: Path | None = None) -> None:
    """A run of a launch (the current one) came to its end; one write, which other processes cannot tear.

    A full disk costs the line, not the run.
    """
    path = launch or current()
    if path is None:
        return
    line = json.dumps({"run": folder.name, "state": state, "error": error}) + "\n"
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def ended(path: Path) -> list[dict[str, Any]]:
    """The runs of a launch that came to their end, without lines that a full disk or a crash has torn."""
    runs = []
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and entry.keys() >= {"run", "state", "error"}:
                runs.append(entry)
    return runs


def stop() -> None:
    """No further run of this launch is to begin."""
    path = current()
    if path is not None:
        with contextlib.suppress(OSError):
            path.with_suffix(".stop").touch()


def stopped(launch: Path | None = None) -> bool:
    """Whether a run of a launch (the current one) has failed under ``on_error=stop``."""
    path = launch or current()
    return path is not None and path.with_suffix(".stop").exists()


def planned(sweep: Path) -> dict[str, tuple[str, ...]]:
    """The overrides of every run that any launch of a sweep set out to do, by the digest of its configuration; those of
    the first launch that did."""
    plans = [read_json(path) for path in sorted((sweep / FOLDER).glob("*.plan.json"), reverse=True)]
    found = [plan.get("runs") for plan in plans if plan is not None]
    runs = [item for runs in found if isinstance(runs, dict) for item in runs.items()]
    return {digest: tuple(overrides) for digest, overrides in runs}


def missing(sweep: Path) -> list[tuple[str, ...]]:
    """The overrides of every planned run that has no folder."""
    known = digests(sweep)
    return [overrides for digest, overrides in planned(sweep).items() if of_digest(known, digest) is None]


@cache
def follow() -> None:
    """In a process that another one started for a launch: end soon after that one is gone, to leave its run to others.

    Once a process; nothing in the process that launches.
    """
    launch = current()
    if launch is None or launcher(launch) == os.getpid():
        return
    # A worker of joblib may come here only after its parent has gone.
    by_joblib = multiprocessing.current_process().name.startswith("Loky")
    parent = launcher(launch) if by_joblib else os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
