"""One run: its folder, seeds, device, and what of its configuration stands in its frame."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

FOLDER = "launches"
# Folders in that of a sweep that are none of a run, and what `collect` leaves when it is killed.
NO_RUNS = (FOLDER, "data", "metrics", "figures", "mlruns")
PASSING = (".part", ".old")
# Hex digits of a digest in the names of folders that older versions made.
OLD_DIGITS = 8
# A name that ends with a digest, of whatever version.
RUN = re.compile(r"(.*-)?[0-9a-f]{8}([0-9a-f]{4})?")


# Keys that say where and how fast, not what: they change neither a result nor the name of its folder.
PLACE_KEYS = (
    "results", "sweep", "device", "num_threads", "resume", "sinks", "memory_map", "rerun", "on_error",
    "train.checkpoint_every", "train.keep",
)  # fmt: skip
MAX_NAME = 120
DIGITS = 12  # of a digest: two of a million runs share one with a probability of 0.2 %


def folder(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """``<results>/<sweep>/<overridden keys>-<hash of the configuration>``; equal configuration, equal folder.

    The words are those of the first time that this configuration ran in the sweep.  Names are at most 120 characters of
    ASCII, and two of them never differ in case only; where they would be longer, the longest values are cut.

    Raises:
        ValueError: The name of the sweep is none.
    """
    check_name(cfg.sweep)
    key, sweep = digest(cfg), Path(cfg.results) / cfg.sweep
    known = _names(sweep.absolute())
    if (found := of_digest(known, key)) is None:
        name = "-".join(filter(None, (_readable(overrides, MAX_NAME - len(key) - 1), key)))
        found = known[key] = Path(settled(sweep, key, name))
    return sweep / found.name


def digest(cfg: DictConfig) -> str:
    """Twelve hex digits of the resolved configuration, without what does not change a result."""
    content: dict[str, Any] = {}
    for key in cfg:
        if key not in (*PLACE_KEYS, "hydra"):
            value = "???" if OmegaConf.is_missing(cfg, key) else cfg[key]
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            content[str(key)] = _without_place(plain, str(key))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]


def words(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that say what a run is, not where or how it is carried out."""
    unsaid = (*PLACE_KEYS, "launcher")
    keys = [item.lstrip("+~").split("=", 1)[0] for item in overrides]
    kept = [key not in unsaid and "/" not in key and not key.startswith("hydra.") for key in keys]
    return tuple(item for item, keep in zip(overrides, kept, strict=True) if keep)


def _readable(overrides: Sequence[str], room: int) -> str:
    """Overridden keys, by the last part of their path where no other has it, and values; in so many characters."""
    given = [item.lstrip("+~").split("=", 1) for item in words(overrides) if "=" in item]
    last = Counter(key.rpartition(".")[2] for key, _ in given)
    named = [(key if last[key.rpartition(".")[2]] > 1 else key.rpartition(".")[2], value) for key, value in given]
    pairs = [(key, re.sub(r"[^A-Za-z0-9._=,+-]", "_", value)) for key, value in sorted(named) if key != "study"]
    for length in range(max((len(value) for _, value in pairs), default=0), -1, -1):
        text = ",".join(f"{key}={value[:length]}" for key, value in pairs)
        if len(text) <= room:
            return text
    return text[:room]


def _without_place(value: Any, path: str) -> Any:
    """What of a value of the configuration changes a result; keys as words, so that they have an order."""
    if isinstance(value, list):
        return [_without_place(part, path) for part in value]
    if not isinstance(value, dict):
        return value
    parts = {f"{path}.{key}": (str(key), part) for key, part in value.items()}
    return {key: _without_place(part, whole) for whole, (key, part) in parts.items() if whole not in PLACE_KEYS}


@cache
def _names(sweep: Path) -> dict[str, Path]:
    """Run folders of a sweep by the digest that their names end with; read once a process."""
    return digests(sweep)


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
