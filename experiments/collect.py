"""Many runs -> one Parquet data set.

python -m experiments.collect sweep=architectures
python -m experiments.collect sweep=architectures csv=true
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from experiments import arguments, dataset, launches
from experiments.files import read_json, write_json
from experiments.ledger import DONE, FAILED, FRAMES, STATUS, Status
from gradscope import frames

DATA, METRICS = "data", "metrics"
INDEX = "collected.json"
# What a manifest says of one run only.
OF_ONE_RUN = ("seconds", "finished", "peak_memory_bytes")


@dataclass(frozen=True)
class Collected:
    """All finished runs of a sweep: one tidy frame, one table of training records (or None), and what they share."""

    frame: pd.DataFrame
    metrics: pd.DataFrame | None
    manifest: dict[str, Any]


@dataclass(frozen=True)
class _Run:
    name: str
    identity: int
    frame: pa.Table
    metrics: pa.Table | None
    manifest: dict[str, Any]


def collect(sweep: Path) -> Collected:
    """Bring the data set of a sweep up to date, reading new and changed runs only, and load it.

    ``data`` and ``metrics`` are folders of Parquet, partitioned by model, with a column ``run`` that names the run's
    folder.  The manifest counts runs: ``runs`` collected, ``failed``, ``half_done``, ``missing`` of those planned, and
    ``stale`` ones of a schema that is too old to be read, which are left out.

    Raises:
        FileNotFoundError: There is no finished run.
        ValueError: A run that says it is done has a frame that cannot be read.
    """
    if not sweep.is_dir():
        raise FileNotFoundError(_nothing(sweep))
    index = read_json(sweep / INDEX) or {"collected": {}, "distinct": {}}
    known: dict[str, Any] = index["collected"] if (sweep / DATA).is_dir() else {}
    states = {folder.name: (folder, Status.read(folder)) for folder in launches.folders(sweep)}
    done = {name: (folder, s) for name, (folder, s) in states.items() if s is not None and s.state == DONE}
    stale = {name for name, (_, status) in done.items() if status.schema > frames.SCHEMA_VERSION or status.schema < 1}
    current = {name: pair for name, pair in done.items() if name not in stale}
    if not current:
        raise FileNotFoundError(_nothing(sweep))
    fresh = [pair for name, pair in current.items() if known.get(name, [None])[0] != _identity(pair[0])]
    gone = known.keys() - current.keys()
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda pair: _read(*pair), fresh))
    collected = {name: entry for name, entry in known.items() if name not in gone}
    collected |= {run.name: [run.identity, run.manifest.get("seconds", 0.0)] for run in runs}
    if changed := {run.name for run in runs} | gone:
        dataset.update(sweep / DATA, [run.frame for run in runs], changed)
        dataset.update(sweep / METRICS, [run.metrics for run in runs if run.metrics is not None], changed)
    distinct = _merged(index["distinct"] if known else {}, [run.manifest for run in runs])
    counts = {
        "runs": len(collected),
        "failed": sum(status is not None and status.state == FAILED for _, status in states.values()),
        "half_done": sum(status is None for _, status in states.values()),
        "missing": len(launches.missing(sweep)),
        "stale": len(stale),
        "seconds": round(sum(seconds for _, seconds in collected.values()), 1),
    }
    manifest = counts | _together(distinct)
    write_json(sweep / INDEX, {"collected": collected, "distinct": distinct, "manifest": manifest})
    collected_now = load(sweep)
    assert collected_now is not None
    return collected_now


def load(sweep: Path) -> Collected | None:
    """What `collect` wrote last, None where it did not."""
    index, frame = read_json(sweep / INDEX), dataset.load(sweep / DATA)
    if index is None or frame is None:
        return None
    return Collected(_checked(frame, sweep), dataset.load(sweep / METRICS), index["manifest"])


def _read(folder: Path, status: Status) -> _Run:
    path = next((folder / name for name in FRAMES if name in status.files), None)
    if path is None:
        raise ValueError(f"The run {folder} was not watched, so there is no frame to collect: monitor.every=100.")
    identity = _identity(folder)  # before reading, so that a run that is made again meanwhile is read again
    try:
        frame = dataset.read_part(path, folder.name)
        metrics = folder / "metrics.parquet"
        table = dataset.read_part(metrics, folder.name) if metrics.name in status.files else None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}), though the run says it is done; the sweep's command makes it again."
        ) from error
    return _Run(folder.name, identity, frame, table, read_json(folder / "manifest.json") or {})


def _identity(folder: Path) -> int:
    """Another one whenever the run is made again; no question of clocks, for it is only compared for equality."""
    return (folder / STATUS).stat().st_mtime_ns


def _checked(frame: pd.DataFrame, sweep: Path) -> pd.DataFrame:
    try:
        return frames.check(frames.upgraded(frame))
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


def _nothing(sweep: Path) -> str:
    example = "python -m experiments.measure -m study=architectures"
    return f"No finished runs under {sweep}: measure first, for example {example}"


@dataclass
class Config:
    """``results``/``sweep`` is the folder whose runs are collected; ``csv``: also as one table ``collected.csv``."""

    results: str = "results/runs"
    sweep: str = "measure"
    csv: bool = False


def main(cfg: Config) -> None:
    """Bring the data set of a sweep up to date, and say how complete it is."""
    sweep = Path(cfg.results) / cfg.sweep
    collected = collect(sweep)
    counts = collected.manifest
    rest = ", ".join(
        f"{counts[name]} {name.replace('_', ' ')}"
        for name in ("failed", "half_done", "missing", "stale")
        if counts[name]
    )
    print(f"{counts['runs']} runs{f' ({rest})' if rest else ''}, {len(collected.frame)} rows -> {sweep / DATA}")
    if cfg.csv:
        print(f"-> {frames.save(collected.frame, sweep / 'collected.csv')}")


if __name__ == "__main__":
    arguments.run(main, Config)
