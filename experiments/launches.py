"""One start of a sweep: what it set out to do, and a line for each run that came to its end.

The lines are for the progress bar; what became of a run is said by its folder alone.  The processes of a launch,
wherever they run, learn its file from the configuration, and each appends whole lines.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, flag_override

from experiments.files import read_json, write_json

VARIABLE = "GRADSCOPE_LAUNCH"
FOLDER = "launches"
# Folders in that of a sweep that are none of a run, and what `collect` leaves when it is killed.
NO_RUNS = (FOLDER, "data", "metrics", "figures", "mlruns")
PASSING = (".part", ".old")
# Hex digits of a digest in the names of folders that older versions made.
OLD_DIGITS = 8
# A name that ends with a digest, of whatever version.
RUN = re.compile(r"(.*-)?[0-9a-f]{8}([0-9a-f]{4})?")


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


def folders(sweep: Path) -> list[Path]:
    """The folders of runs in that of a sweep, by name: those that end with a digest, or have a status.  Another sweep,
    and what somebody else put there, is none."""
    names = {entry.name for entry in os.scandir(sweep) if entry.is_dir() and not entry.name.endswith(PASSING)}
    return [
        sweep / name
        for name in sorted(names.difference(NO_RUNS))
        if RUN.fullmatch(name) or (sweep / name / "status.json").is_file()
    ]


def check_name(sweep: str) -> None:
    """See that the runs of a sweep would not stand where something else of another one does.

    Raises:
        ValueError: A part of the name has such a meaning.
    """
    for part in Path(sweep).parts:
        if part in NO_RUNS or part.endswith(PASSING) or part == "..":
            raise ValueError(f"sweep={sweep}: no sweep can be called {part!r}, which means something else.")


def digests(sweep: Path) -> dict[str, Path]:
    """The folders of runs by the digest that their names end with."""
    return {folder.name.rpartition("-")[2]: folder for folder in folders(sweep)} if sweep.is_dir() else {}


def of_digest(known: Mapping[str, Path], digest: str) -> Path | None:
    """The one of `digests` that belongs to a configuration, also under a name that an older version gave it."""
    return known.get(digest) or known.get(digest[:OLD_DIGITS])


def settled(sweep: Path, digest: str, name: str) -> str:
    """The folder's name that all processes use for a configuration: the one that was put down first.

    Making a link is atomic, so of two launches that ask for one configuration in different words one decides.
    """
    place = sweep / FOLDER / "names" / digest
    mine = place.with_name(f"{uuid.uuid4().hex}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(name)
        with contextlib.suppress(FileExistsError):
            os.link(mine, place)
        mine.unlink()
        return place.read_text() or name
    except OSError:  # nothing can be written, as the run will say, or there are no links
        mine.unlink(missing_ok=True)
        return name


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
