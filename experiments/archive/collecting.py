"""TODO docstring."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from experiments.archive import tables
from experiments.archive.tables import Collected
from experiments.files import read_json, write_json
from experiments.runs import launches, locks, names
from experiments.runs.outcomes import DONE, FAILED, FRAMES, METRICS, STATUS, Status
from gradscope import frames

DATA, RECORDS = "data", "metrics"
INDEX = "collected.json"
# What a manifest says of one run only.
OF_ONE_RUN = ("seconds", "finished", "peak_memory_bytes")


@dataclass(frozen=True)
class _Run:
    name: str
    identity: int
    frame: pa.Table
    metrics: pa.Table | None
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Unread:
    name: str
    identity: int
    why: str
    stale: bool  # of another schema, else torn or incomplete


def collect(sweep: Path) -> Collected:
    """Bring the data set of a sweep up to date, reading new and changed runs only, and load it.

    ``data`` and ``metrics`` are folders of Parquet, partitioned by model, with a column ``run`` that names the run's
    folder.  The manifest counts runs: ``runs`` collected (those that diverged, which count as ``failed`` besides, up to
    there), ``failed``, ``half_done``, ``missing`` of those planned, and those left out though they have a result:
    ``stale`` ones of a schema that is not known here, and ``unreadable`` ones, whose files are torn or lack what a
    frame has; the index says of each why.

    One process at a time does this for a sweep; others wait.

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: There is none that can be read.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(_nothing(sweep))
    with locks.claimed(sweep, wait=True):
        return _collect(sweep)


def _has_result(status: Status) -> bool:
    """A run that is done, or one that failed because its loss diverged, with the records up to there."""
    return status.state == DONE or (status.state == FAILED and bool(set(FRAMES) & set(status.files)))


def load(sweep: Path) -> Collected | None:
    """What `collect` wrote last, None where it did not; waits for one that is writing."""
    if not (sweep / INDEX).is_file():
        return None
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # nothing can be written here, so nobody does
            held.enter_context(locks.claimed(sweep, wait=True))
        return _load(sweep)


def _load(sweep: Path) -> Collected | None:
    index, frame = read_json(sweep / INDEX), tables.load(sweep / DATA)
    if index is None or frame is None:
        return None
    return Collected(_checked(frame, sweep), tables.load(sweep / RECORDS), index["manifest"])


def unreadable(sweep: Path) -> dict[str, tuple[int, str]]:
    """Runs that were left out when they were last collected: the `identity` that they had, and why, by name."""
    found = (read_json(sweep / INDEX) or {}).get("unread", {})
    return {name: (entry[0], entry[1]) for name, entry in found.items()}


def _collect(sweep: Path) -> Collected:
    for folder in (sweep / DATA, sweep / RECORDS):
        tables.recover(folder)
    index = read_json(sweep / INDEX) or {}
    if not all(isinstance(index.get(key), dict) for key in ("collected", "distinct")):
        index = {"collected": {}, "distinct": {}}
    states = {folder.name: (folder, Status.read(folder)) for folder in names.folders(sweep)}
    done = {name: (folder, s) for name, (folder, s) in states.items() if s is not None and _has_result(s)}
    if not done:
        raise FileNotFoundError(_nothing(sweep, [name for name, (_, status) in states.items() if status is not None]))
    known: dict[str, Any] = {name: entry for name, entry in index["collected"].items() if name in done}
    recorded = any(METRICS in done[name][1].files for name in known)
    if not (sweep / DATA).is_dir() or (recorded and not (sweep / RECORDS).is_dir()):
        known = {}
    fresh = [pair for name, pair in done.items() if known.get(name, [None])[0] != identity(pair[0])]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda pair: _read(*pair), fresh))
    runs = [run for run in read if isinstance(run, _Run)]
    unread = [run for run in read if isinstance(run, _Unread)]
    kept = known.keys() - {run.name for run in read}
    collected = {name: known[name] for name in kept}
    collected |= {run.name: [run.identity, run.manifest.get("seconds", 0.0)] for run in runs}
    if not collected:
        raise ValueError(_all_unread(sweep, unread))
    locks.confirm(sweep)
    if runs or index["collected"].keys() != kept:
        tables.update(sweep / DATA, [run.frame for run in runs], kept)
        tables.update(sweep / RECORDS, [run.metrics for run in runs if run.metrics is not None], kept)
    distinct = _merged(index["distinct"] if known else {}, [run.manifest for run in runs])
    counts = {
        "runs": len(collected),
        "failed": sum(status is not None and status.state == FAILED for _, status in states.values()),
        "half_done": sum(status is None for _, status in states.values()),
        "missing": len(launches.missing(sweep)),
        "stale": sum(run.stale for run in unread),
        "unreadable": sum(not run.stale for run in unread),
        "seconds": round(sum(seconds for _, seconds in collected.values()), 1),
    }
    manifest = counts | _together(distinct)
    left_out = {run.name: [run.identity, run.why] for run in unread}
    content = {"collected": collected, "unread": left_out, "distinct": distinct, "manifest": manifest}
    write_json(sweep / INDEX, content)
    collected_now = _load(sweep)
    assert collected_now is not None
    return collected_now


def _read(folder: Path, status: Status) -> _Run | _Unread:
    before = identity(folder)  # before reading, so that a run that is made again meanwhile is read again
    path = next((folder / name for name in FRAMES if name in status.files), None)
    if path is None:
        why = "it has no frame; a training run has one if it is watched (monitor.every=100)"
        return _Unread(folder.name, before, why, stale=False)
    try:
        frames.check_version(status.schema, path)
        frame = tables.read_frame(path, folder.name)
        path = folder / METRICS
        table = tables.read_part(path, folder.name) if METRICS in status.files else None
    except (OSError, ValueError, pa.ArrowException) as error:
        stale = isinstance(error, frames.SchemaError)
        return _Unread(folder.name, before, str(error) if stale else f"{path.name}: {error}", stale)
    return _Run(folder.name, before, frame, table, read_json(folder / "manifest.json") or {})


def identity(folder: Path) -> int:
    """Of a run: another one whenever it is made again, 0 while it is; no question of clocks, for it is only compared
    for equality."""
    try:
        return (folder / STATUS).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _checked(frame: pd.DataFrame, sweep: Path) -> pd.DataFrame:
    try:
        return frames.check(frames.typed(frame))
    except ValueError as error:
        raise ValueError(f"A frame of {sweep} does not keep the schema: {error}") from error


def _merged(distinct: dict[str, Any], manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every value that each key of the manifests has had, nested keys by their path."""
    merged = {key: {json.dumps(value, sort_keys=True): None for value in values} for key, values in distinct.items()}
    for manifest in manifests:
        for path, value in _flat({key: value for key, value in manifest.items() if key not in OF_ONE_RUN}):
            merged.setdefault(json.dumps(path), {})[json.dumps(value, sort_keys=True)] = None
    return {key: [json.loads(value) for value in values] for key, values in merged.items()}


def _together(distinct: dict[str, Any]) -> dict[str, Any]:
    """The same as one nested manifest: one value where all agree, else the list of what occurs."""
    result: dict[str, Any] = {}
    for key, values in distinct.items():
        *parents, last = json.loads(key)
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = values[0] if len(values) == 1 else values
    return result


def _flat(content: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    flat = []
    for key, value in content.items():
        nested = isinstance(value, dict) and value
        flat += _flat(value, (*prefix, key)) if nested else [((*prefix, key), value)]
    return flat


def _nothing(sweep: Path, failed: Sequence[str] = ()) -> str:
    if failed:
        return (
            f"No finished runs under {sweep}: {len(failed)} failed.  python -m experiments.status {sweep} says why; "
            "the sweep's command makes them again."
        )
    example = "python -m experiments.measure -m study=architectures"
    return f"No finished runs under {sweep}: measure first, for example {example}"


def _all_unread(sweep: Path, unread: Sequence[_Unread]) -> str:
    stale = sum(run.stale for run in unread)
    kinds = [f"{num} {kind}" for num, kind in ((stale, "stale"), (len(unread) - stale, "unreadable")) if num]
    return (
        f"No run of {sweep} can be collected ({' and '.join(kinds)}): {unread[0].name}: {unread[0].why}\n"
        "The sweep's command with rerun=true makes them again."
    )
