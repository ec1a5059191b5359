"""The name of a run's folder, which ends with a digest of the run's configuration."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from gradscope.files import read_text

LAUNCHES = "launches"
# Folders of a sweep that are not run folders, and suffixes of the folders that a killed `collect` leaves.
NO_RUNS = (LAUNCHES, "data", "metrics", "figures", "mlruns")
PASSING = (".part", ".old")
# Keys that say where and how fast a run is executed.  They change neither the run's result nor its folder's name.
PLACE_KEYS = (
    "results", "sweep", "device", "num_threads", "resume", "sinks", "memory_map", "rerun", "on_error",
    "train.checkpoint_every", "train.keep",
)  # fmt: skip
# Keys that did not always exist.  With these values they change no result, so older run folders keep their names.
ADDED_KEYS = {
    "train.average": 0.0, "train.test_mirrored": False, "train.augmentation.alternate": False,
    "train.augmentation.reflect": False,
}  # fmt: skip
ON_ERROR = ("continue", "stop")
MAX_NAME, LEAST_VALUE = 120, 8  # characters of a folder's name, and of a value that is cut
MOST_NAME = 1000  # bytes of a file that holds a name
DIGITS = 12  # in a digest; among a million runs, two have the same digest with probability 0.2 %
# Folder names that end with a digest.
RUN = re.compile(rf"(.*-)?[0-9a-f]{{{DIGITS}}}")


def folder(cfg: DictConfig, overrides: Sequence[str]) -> Path:
    """The folder ``<results>/<sweep>/<overridden keys>-<digest>`` of a run.  Equal configurations have equal folders.

    The overridden keys are those of the first command that ran this configuration in the sweep.  Names have at most 120
    ASCII characters; long values are cut if necessary, and then keys are left out.  No two names differ in case only.
    """
    check(cfg)
    key, sweep = digest(cfg), Path(cfg.results) / cfg.sweep
    known = _known(sweep.absolute())
    if key not in known:
        known[key] = agreed(sweep, key, "-".join(filter(None, (_readable(overrides, MAX_NAME - len(key) - 1), key))))
    return sweep / known[key]


def digest(cfg: DictConfig) -> str:
    """A hash of the resolved configuration in twelve hex digits, without the keys that do not change a result."""
    content: dict[str, Any] = {}
    for key in cfg:
        if key not in (*PLACE_KEYS, "hydra"):
            value = "???" if OmegaConf.is_missing(cfg, key) else cfg[key]
            plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            content[str(key)] = _without_place(plain, str(key))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:DIGITS]


def digest_of(folder: Path) -> str:
    """The digest that the name of a run's folder ends with."""
    return folder.name.rpartition("-")[2]


def words(overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that say what a run computes, without those that say where or how fast it is executed."""
    unsaid = (*PLACE_KEYS, "launcher")
    keys = {item: item.lstrip("+~").split("=", 1)[0] for item in overrides}
    return tuple(
        item for item, key in keys.items() if key not in unsaid and "/" not in key and not key.startswith("hydra.")
    )


def _readable(overrides: Sequence[str], room: int) -> str:
    """Overridden keys and values in at most ``room`` characters.  A key is cut to its last part if that is unique.

    The longest values are cut, down to `LEAST_VALUE` characters.  Then the last keys are only counted: ",+3".
    """
    given = [item.lstrip("+~").split("=", 1) for item in words(overrides) if "=" in item]
    short = {key: key.rpartition(".")[2] for key, _ in given}
    num = Counter(short[key] for key, _ in given)
    named = [(key if num[short[key]] > 1 else short[key], value) for key, value in given]
    pairs = [(key, re.sub(r"[^A-Za-z0-9._=,+-]", "_", value)) for key, value in sorted(named) if key != "study"]
    longest = max((len(value) for _, value in pairs), default=0)
    for length in range(max(longest, LEAST_VALUE), LEAST_VALUE - 1, -1):
        text = ",".join(parts := [f"{key}={value[:length]}" for key, value in pairs])
        if len(text) <= room:
            return text
    for kept in range(len(parts) - 1, 0, -1):
        if len(text := f"{','.join(parts[:kept])},+{len(parts) - kept}") <= room:
            return text
    return text[:room]


def _without_place(value: Any, path: str) -> Any:
    """A value of the configuration without `PLACE_KEYS` and without `ADDED_KEYS` that change nothing.

    Keys become strings, so that the keys can be sorted.
    """
    if isinstance(value, list):
        return [_without_place(part, path) for part in value]
    if not isinstance(value, dict):
        return value
    parts = {f"{path}.{key}": (str(key), part) for key, part in value.items()}
    return {
        key: _without_place(part, whole)
        for whole, (key, part) in parts.items()
        if whole not in PLACE_KEYS and (whole not in ADDED_KEYS or part != ADDED_KEYS[whole])
    }


@cache
def _known(sweep: Path) -> dict[str, str]:
    """Names of the run folders of a sweep by digest, read once per process."""
    return {digest_of(folder): folder.name for folder in folders(sweep)}


def folders(sweep: Path) -> list[Path]:
    """The run folders of a sweep, sorted by name: folders whose name ends with a digest or that hold a status."""
    if not sweep.is_dir():
        return []
    # A link does not count as a run folder: its target may belong to somebody else, and a run would be written there.
    entries = (entry for entry in os.scandir(sweep) if entry.is_dir(follow_symlinks=False))
    names = {entry.name for entry in entries if not entry.name.endswith(PASSING)}
    return [
        sweep / name
        for name in sorted(names.difference(NO_RUNS))
        if RUN.fullmatch(name) or (sweep / name / "status.json").is_file()
    ]


def check(cfg: DictConfig) -> None:
    """Raise ValueError if a value is missing, ``on_error`` is unknown, or the sweep's name is empty or reserved."""
    plain = (key for key in cfg if key != "hydra" and not OmegaConf.is_interpolation(cfg, str(key)))
    for group in (key for key in plain if not OmegaConf.is_missing(cfg, key) and OmegaConf.is_dict(cfg[key])):
        for key in sorted(OmegaConf.missing_keys(cfg[group])):
            raise ValueError(f"{key} needs a value: {key}=...")
    if not cfg.sweep:
        raise ValueError("sweep needs a name, which is that of a folder in results: sweep=NAME")
    for part in Path(cfg.sweep).parts:
        if part in NO_RUNS or part.endswith(PASSING) or part == "..":
            raise ValueError(
                f"sweep={cfg.sweep}: {part!r} is reserved and cannot be part of a sweep's name; choose another name."
            )
    if cfg.on_error not in ON_ERROR:
        raise ValueError(f"on_error must be one of {', '.join(ON_ERROR)}, got {cfg.on_error!r}.")


def agreed(sweep: Path, digest: str, name: str) -> str:
    """The folder name that all processes use for a configuration.  The first process decides, by creating a link."""
    place = sweep / LAUNCHES / "names" / digest
    mine = place.with_name(f"{uuid.uuid4().hex}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text(name)
        with contextlib.suppress(FileExistsError):
            os.link(mine, place)
        mine.unlink()
        found = read_text(place, MOST_NAME)
        # A sweep may come from elsewhere, and this name decides where a run writes.
        return found if RUN.fullmatch(found) and found.endswith(digest) and Path(found).name == found else name
    except (OSError, ValueError):  # there are no hard links, or nothing can be written; the run will report the latter
        mine.unlink(missing_ok=True)
        return name
