"""Collect the runs of a sweep into one data set, and keep the data set up to date.

Files of runs may come from elsewhere: nothing in them is run, and a run with a file that cannot be read is left out.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from experiments import runs
from experiments.archive import tables
from experiments.archive.manifests import Distinct
from experiments.archive.tables import Collected
from experiments.files import ONE_RUN, SWEEP, read_json, write_json
from experiments.program import program
from experiments.runs import DONE, FAILED, FRAMES, HALF_DONE, METRICS, MISSING, RUNNING, Outcome, Status
from gradscope import files, frames

DATA, RECORDS = "data", "metrics"
INDEX = "collected.json"
# Keys of the manifest with the numbers of runs that the data set lacks wholly or in part.
COUNTED = ("failed", "running", "half_done", "missing", "stale", "unreadable")
BATCH, SMALL = 64, 2 << 20  # most runs per batch; most bytes of a table in a batch
MOST_WHY = 300  # characters of the reason why a run is left out


@dataclass(frozen=True)
class _Run:
    name: str
    changed: int
    file: str
    frame: pa.Table
    metrics: pa.Table | None
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Unread:
    name: str
    changed: int
    why: str
    stale: bool = False  # True: the frame has another schema.  False: a file is damaged or missing.


@dataclass
class _Batch:
    """Runs, the rows of their frames and of their records of training, and the runs that are left out."""

    unread: list[_Unread]
    runs: list[_Run] = field(default_factory=list)
    frames: list[pa.Table] = field(default_factory=list)
    metrics: list[pa.Table] = field(default_factory=list)

    def add(self, new: Sequence[_Run]) -> None:
        """Add runs, or nothing and raise ValueError if the tables of a run do not pass."""
        file, recorded = new[0].file, [run for run in new if run.metrics is not None]
        try:
            # In many small parts, the rows would take more memory.
            rows = tables.of_runs([run.frame for run in new], [run.name for run in new], frames.SCHEMA).combine_chunks()
            tables.check(rows)
            file = METRICS
            parts = [run.metrics for run in recorded if run.metrics is not None]
            records = [tables.of_runs(parts, [run.name for run in recorded], {})] if parts else []
        except (ValueError, pa.ArrowException) as error:
            raise ValueError(f"{file}: {error}") from error
        self.runs += new
        self.frames.append(rows)
        self.metrics += records


def collect(sweep: Path) -> Collected:
    """The data set of a sweep, after `update`."""
    update(sweep)
    collected = load(sweep)
    assert collected is not None
    return collected


def update(sweep: Path) -> dict[str, Any]:
    """Bring the data set of a sweep up to date by reading only new and changed runs; returns its manifest.

    ``data`` and ``metrics`` are folders of Parquet, partitioned by model; the column ``run`` names the run's folder.
    The manifest counts runs by their state.  A diverged run counts as failed, but its records are collected.
    Two kinds of runs are left out: ``stale`` (the frame has another schema) and ``unreadable`` (a file is damaged).
    ``collected.json`` holds the reasons.  Only one process at a time collects a sweep; others wait.  Runs are read in
    batches: the memory that this takes does not grow with their number.

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: None of the finished runs can be read.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(_nothing(sweep))
    with runs.locked(sweep, wait=True):
        return _update(sweep)


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
    try:
        frame = tables.load(sweep / DATA)
        if frame is None or (index := _index(sweep)) is None:
            return None
        return Collected(frames.check(frames.typed(frame)), tables.load(sweep / RECORDS), index["manifest"])
    except Exception as error:  # damaged bytes can raise nearly any exception
        why = files.printable(error, MOST_WHY)
        raise ValueError(
            f"What was collected of {sweep} cannot be read ({type(error).__name__}: {why}); if it is damaged, delete "
            f"{INDEX}, and collect again."
        ) from error


def _index(sweep: Path) -> dict[str, Any] | None:
    """What the last `update` noted; None if there is no such file or it is damaged."""
    index = read_json(sweep / INDEX, SWEEP)
    kinds = {"collected": dict, "unread": dict, "distinct": dict, "manifest": dict}
    if index is None or not all(isinstance(index.get(key), kind) for key, kind in kinds.items()):
        return None
    sound = all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int) and isinstance(entry[1], kind)
        for key, kind in (("collected", int | float), ("unread", str)) for entry in index[key].values()
    )  # fmt: skip
    counted = all(isinstance(index["manifest"].get(name), int) for name in ("runs", "rows", *COUNTED))
    try:
        paths = all(all(isinstance(part, str) for part in files.parse_json(key)) for key in index["distinct"])
    except (ValueError, TypeError):
        return None
    return index if sound and counted and paths and all(map(_is_list, index["distinct"].values())) else None


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def unreadable(sweep: Path) -> dict[str, tuple[int, str]]:
    """Time stamp and reason for each run that the last `update` left out, by the name of the run."""
    return {name: (entry[0], entry[1]) for name, entry in (_index(sweep) or {"unread": {}})["unread"].items()}


def _update(sweep: Path) -> dict[str, Any]:
    for folder in (sweep / DATA, sweep / RECORDS):
        tables.recover(folder)
    index = _index(sweep) or {"collected": {}, "distinct": {}}
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
    kept = known.keys() - {outcome.name for outcome in fresh}
    distinct = Distinct(index["distinct"] if known else {})
    collected, unread = {name: known[name] for name in kept}, list[_Unread]()
    data, records = (tables.Update(sweep / name, kept) for name in (DATA, RECORDS))
    for batch in _read_all(fresh):
        unread += batch.unread
        data.add(*batch.frames)
        records.add(*batch.metrics)
        for run in batch.runs:
            distinct.add(run.manifest)
            collected[run.name] = [run.changed, run.manifest.get("seconds", 0.0)]
    damaged = (one for one in outcomes if one.changed and one.status is None)
    unread += [_Unread(one.name, one.changed, "status.json is damaged") for one in damaged if one.state != RUNNING]
    num_stale = sum(run.stale for run in unread)
    if not collected:
        kinds = {"stale": num_stale, "unreadable": len(unread) - num_stale}
        what = " and ".join(f"{num} {kind}" for kind, num in kinds.items() if num)
        raise ValueError(
            f"No run of {sweep} can be collected ({what}): {unread[0].name}: {unread[0].why}\n"
            "To repeat these runs, run the command of the sweep with rerun=true."
        )
    runs.confirm(sweep)
    if collected.keys() != kept or index["collected"].keys() != kept:
        data.finish()
        records.finish()
    counts = [*(num[state] for state in (FAILED, RUNNING, HALF_DONE, MISSING)), num_stale, len(unread) - num_stale]
    manifest = {
        "runs": len(collected),
        "rows": tables.num_rows(sweep / DATA),
        **dict(zip(COUNTED, counts, strict=True)),
        "seconds": round(sum(seconds for _, seconds in collected.values()), 1),
        **distinct.together(),
    }
    named = {run.name: [run.changed, run.why] for run in unread}
    content = {"collected": collected, "unread": named, "distinct": distinct.content(), "manifest": manifest}
    write_json(sweep / INDEX, content)
    return manifest


def _read_all(outcomes: Sequence[Outcome]) -> Iterator[_Batch]:
    """The runs, and those that are left out, in batches; a run with a large table is a batch of its own."""
    names = {tables.RUN}
    rest = iter(outcomes)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:  # more would wait for each other
        while batch := list(islice(rest, BATCH)):
            read = list(pool.map(lambda outcome: _read(outcome, SMALL), batch))
            small = [one for one in read if not isinstance(one, Outcome)]
            yield _checked(small, names)
            for large in (one for one in read if isinstance(one, Outcome)):
                one = _read(large, None)
                assert not isinstance(one, Outcome)
                yield _checked([one], names)


def _checked(read: Sequence[_Run | _Unread], names: set[str]) -> _Batch:
    """The runs whose values pass, and the others.  Their columns are added to ``names``, those of the data set."""
    new, batch = list[_Run](), _Batch([run for run in read if isinstance(run, _Unread)])
    for run in (run for run in read if isinstance(run, _Run)):
        own = {name for table in (run.frame, run.metrics) if table is not None for name in table.column_names}
        if len(names | own) > files.MOST_COLUMNS:
            why = f"with its columns, the data set would have more than {files.MOST_COLUMNS}."
            batch.unread.append(_Unread(run.name, run.changed, why))
            continue
        names |= own
        new.append(run)
    try:
        if new:
            batch.add(new)
    except ValueError:  # at least one run does not pass
        for run in new:
            try:
                batch.add([run])
            except ValueError as error:
                batch.unread.append(_Unread(run.name, run.changed, files.printable(error, MOST_WHY)))
    return batch


def _read(outcome: Outcome, most: int | None) -> _Run | _Unread | Outcome:
    """One run, or why it is left out.  The outcome itself: a table takes more than ``most`` bytes of memory."""
    # The time stamp is older than this read.  If the run is repeated meanwhile, the next `update` reads it again.
    folder, status, changed = outcome.folder, outcome.status, outcome.changed
    assert folder is not None and status is not None
    path = next((folder / name for name in FRAMES if name in status.files), None)
    if path is None:
        why = "it has no frame; a training run has one if it is monitored (monitor.every=100)"
        return _Unread(folder.name, changed, why)
    try:
        frames.check_version(status.schema, path)
        frame, name = tables.read_frame(path, most), path.name
        path = folder / METRICS
        table = tables.read_part(path, most) if METRICS in status.files else None
        path = folder / "manifest.json"
        return _Run(folder.name, changed, name, frame, table, _manifest(path))
    except files.TooLargeError as error:
        return outcome if most is not None else _Unread(folder.name, changed, files.printable(error, MOST_WHY))
    except frames.SchemaError as error:
        return _Unread(folder.name, changed, files.printable(error, MOST_WHY), stale=True)
    except Exception as error:  # damaged bytes can raise nearly any exception
        return _Unread(folder.name, changed, files.printable(f"{path.name}: {error}", MOST_WHY))


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a run; an empty one if there is no file."""
    try:
        manifest = files.parse_json(files.read_text(path, ONE_RUN))
    except FileNotFoundError:
        return {}
    seconds = manifest.get("seconds", 0.0) if isinstance(manifest, dict) else None
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise ValueError(f"seconds must be a finite number >= 0, got {seconds!r}.")
    return dict(manifest)


def _nothing(sweep: Path, num_failed: int = 0) -> str:
    advice = f"measure first, for example {program('measure')} -m study=architectures"
    if num_failed:
        why = f"{program('status')} {sweep} prints the errors"
        advice = f"{num_failed} failed.  {why}; the command of the sweep repeats the failed runs."
    return f"No finished runs under {sweep}: {advice}"
