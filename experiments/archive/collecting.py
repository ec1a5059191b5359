"""Collect the runs of a sweep into one data set, and keep the data set up to date."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiments import runs
from experiments.archive import tables
from experiments.archive.tables import Collected
from experiments.files import read_json, write_json
from experiments.program import program
from experiments.runs import DONE, FAILED, FRAMES, HALF_DONE, METRICS, MISSING, RUNNING, Outcome, Status
from gradscope import frames

DATA, RECORDS = "data", "metrics"
INDEX = "collected.json"
# Keys of the manifest with the numbers of runs that the data set lacks wholly or in part.
COUNTED = ("failed", "running", "half_done", "missing", "stale", "unreadable")
# Keys of a manifest that belong to one run only.
OF_ONE_RUN = ("seconds", "finished", "peak_memory_bytes")


@dataclass(frozen=True)
class _Run:
    name: str
    changed: int
    frame: pa.Table
    metrics: pa.Table | None
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Unread:
    name: str
    changed: int
    why: str
    stale: bool  # True: the frame has another schema.  False: a file is damaged or missing.


def collect(sweep: Path) -> Collected:
    """The data set of a sweep, brought up to date by reading only new and changed runs.

    ``data`` and ``metrics`` are folders of Parquet, partitioned by model; the column ``run`` names the run's folder.
    The manifest counts runs by their state.  A diverged run counts as failed, but its records are collected.
    Two kinds of runs are left out: ``stale`` (the frame has another schema) and ``unreadable`` (a file is damaged).
    ``collected.json`` holds the reasons.  Only one process at a time collects a sweep; others wait.

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: None of the finished runs can be read.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(_nothing(sweep))
    with runs.locked(sweep, wait=True):
        return _collect(sweep)


def _has_result(status: Status) -> bool:
    """Whether a run is done, or has records up to the step where its loss diverged."""
    return status.state == DONE or (status.state == FAILED and bool(set(FRAMES) & set(status.files)))


def load(sweep: Path) -> Collected | None:
    """The data set that `collect` wrote last, or None.  Waits while another process is writing the data set."""
    if not (sweep / INDEX).is_file():
        return None
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):  # a read-only file system cannot be locked, but nobody writes there
            held.enter_context(runs.locked(sweep, wait=True))
        return _load(sweep)


def _load(sweep: Path) -> Collected | None:
    index, frame = read_json(sweep / INDEX), tables.load(sweep / DATA)
    if index is None or frame is None:
        return None
    try:
        frame = frames.check(frames.typed(frame))
    except ValueError as error:
        raise ValueError(f"A frame of {sweep} does not follow the schema: {error}") from error
    return Collected(frame, tables.load(sweep / RECORDS), index["manifest"])


def unreadable(sweep: Path) -> dict[str, tuple[int, str]]:
    """Time stamp and reason for each run that the last `collect` left out, by the name of the run."""
    found = (read_json(sweep / INDEX) or {}).get("unread", {})
    return {name: (entry[0], entry[1]) for name, entry in found.items()}


def _collect(sweep: Path) -> Collected:
    for folder in (sweep / DATA, sweep / RECORDS):
        tables.recover(folder)
    index = read_json(sweep / INDEX) or {}
    if not all(isinstance(index.get(key), dict) for key in ("collected", "distinct")):
        index = {"collected": {}, "distinct": {}}
    outcomes = runs.states(sweep)
    done = {outcome.name: outcome for outcome in outcomes if outcome.status and _has_result(outcome.status)}
    num = Counter(outcome.state for outcome in outcomes)
    if not done:
        raise FileNotFoundError(_nothing(sweep, num[FAILED]))
    known: dict[str, Any] = {name: entry for name, entry in index["collected"].items() if name in done}
    recorded = any(METRICS in status.files for name in known if (status := done[name].status))
    if not (sweep / DATA).is_dir() or (recorded and not (sweep / RECORDS).is_dir()):
        known = {}
    fresh = [outcome for name, outcome in done.items() if known.get(name, [None])[0] != outcome.changed]
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(_read, fresh))
    new = [run for run in read if isinstance(run, _Run)]
    unread = [run for run in read if isinstance(run, _Unread)]
    kept = known.keys() - {run.name for run in read}
    collected = {name: known[name] for name in kept}
    collected |= {run.name: [run.changed, run.manifest.get("seconds", 0.0)] for run in new}
    num_stale = sum(run.stale for run in unread)
    if not collected:
        kinds = {"stale": num_stale, "unreadable": len(unread) - num_stale}
        what = " and ".join(f"{num} {kind}" for kind, num in kinds.items() if num)
        raise ValueError(
            f"No run of {sweep} can be collected ({what}): {unread[0].name}: {unread[0].why}\n"
            "To repeat these runs, run the command of the sweep with rerun=true."
        )
    runs.confirm(sweep)
    if new or index["collected"].keys() != kept:
        tables.update(sweep / DATA, [run.frame for run in new], kept)
        tables.update(sweep / RECORDS, [run.metrics for run in new if run.metrics is not None], kept)
    distinct = _merged(index["distinct"] if known else {}, [run.manifest for run in new])
    counts = [*(num[state] for state in (FAILED, RUNNING, HALF_DONE, MISSING)), num_stale, len(unread) - num_stale]
    manifest = {
        "runs": len(collected),
        **dict(zip(COUNTED, counts, strict=True)),
        "seconds": round(sum(seconds for _, seconds in collected.values()), 1),
        **_together(distinct),
    }
    left_out = {run.name: [run.changed, run.why] for run in unread}
    content = {"collected": collected, "unread": left_out, "distinct": distinct, "manifest": manifest}
    write_json(sweep / INDEX, content)
    collected_now = _load(sweep)
    assert collected_now is not None
    return collected_now


def _read(outcome: Outcome) -> _Run | _Unread:
    # The time stamp is older than this read.  If the run is repeated meanwhile, the next `collect` reads it again.
    folder, status, changed = outcome.folder, outcome.status, outcome.changed
    assert folder is not None and status is not None
    path = next((folder / name for name in FRAMES if name in status.files), None)
    if path is None:
        why = "it has no frame; a training run has one if it is monitored (monitor.every=100)"
        return _Unread(folder.name, changed, why, stale=False)
    try:
        frames.check_version(status.schema, path)
        frame = tables.read_frame(path, folder.name)
        path = folder / METRICS
        table = tables.read_part(path, folder.name) if METRICS in status.files else None
    except (OSError, ValueError, pa.ArrowException) as error:
        stale = isinstance(error, frames.SchemaError)
        return _Unread(folder.name, changed, str(error) if stale else f"{path.name}: {error}", stale)
    return _Run(folder.name, changed, frame, table, read_json(folder / "manifest.json") or {})


def _merged(distinct: dict[str, Any], manifests: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All values of each key in the manifests.  A nested key is given by its path."""
    merged = {key: {json.dumps(value, sort_keys=True): None for value in values} for key, values in distinct.items()}
    for manifest in manifests:
        for path, value in _flat({key: value for key, value in manifest.items() if key not in OF_ONE_RUN}):
            merged.setdefault(json.dumps(path), {})[json.dumps(value, sort_keys=True)] = None
    return {key: [json.loads(value) for value in values] for key, values in merged.items()}


def _together(distinct: dict[str, Any]) -> dict[str, Any]:
    """One nested manifest.  A key has one value if all runs agree, else the list of all values."""
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


def _nothing(sweep: Path, num_failed: int = 0) -> str:
    advice = f"measure first, for example {program('measure')} -m study=architectures"
    if num_failed:
        why = f"{program('status')} {sweep} prints the errors"
        advice = f"{num_failed} failed.  {why}; the command of the sweep repeats the failed runs."
    return f"No finished runs under {sweep}: {advice}"
