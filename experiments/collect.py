"""Many runs -> one frame.

python -m experiments.collect sweep=architectures
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import arguments
from experiments.run import write_json, write_table
from gradscope import frames

FRAMES = ("frame.parquet", "monitor.parquet")  # of a measurement, of a training run that was watched
METRICS = "metrics.parquet"


@dataclass(frozen=True)
class Collected:
    """All finished runs of a sweep: one tidy frame, one table of training records (or None), and what they share."""

    frame: pd.DataFrame
    metrics: pd.DataFrame | None
    manifest: dict[str, Any]


def collect(folder: Path) -> Collected:
    """All finished runs below a sweep's folder.

    Raises:
        FileNotFoundError: There are none.
    """
    paths = sorted(folder.glob("*/manifest.json"))
    if not paths:
        raise FileNotFoundError(
            f"No finished runs under {folder}: measure first, for example "
            "python -m experiments.measure -m study=architectures"
        )
    parts = [path.parent / name for path in paths for name in FRAMES if (path.parent / name).is_file()]
    records = [path.parent / METRICS for path in paths if (path.parent / METRICS).is_file()]
    if not parts:
        raise FileNotFoundError(f"The runs under {folder} were not watched, so there is no frame: monitor.every=100.")
    manifests = [json.loads(path.read_text()) for path in paths]
    manifest = {
        "runs": len(paths),
        "seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
        **{
            key: _distinct([manifest[key] for manifest in manifests])
            for key in manifests[0]
            if key not in ("seconds", "finished")
        },
    }
    metrics = pd.concat(map(pd.read_parquet, records), ignore_index=True) if records else None
    return Collected(pd.concat(map(frames.load, parts), ignore_index=True), metrics, manifest)


def _distinct(values: list[Any]) -> Any:
    """One value where all agree, a mapping key by key, else the list of what occurs."""
    if all(value == values[0] for value in values):
        return values[0]
    if all(isinstance(value, dict) for value in values):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: _distinct([value.get(key) for value in values]) for key in keys}
    unique = {json.dumps(value, sort_keys=True): value for value in values}
    return list(unique.values())


@dataclass
class Config:
    """``results``/``sweep`` is the folder whose runs are collected."""

    results: str = "results/runs"
    sweep: str = "measure"


def main(cfg: Config) -> None:
    """Write ``collected.parquet``, ``collected.json`` and records of training into the sweep's folder."""
    folder = Path(cfg.results) / cfg.sweep
    collected = collect(folder)
    path = frames.save(collected.frame, folder / "collected.parquet")
    if collected.metrics is not None:
        write_table(collected.metrics, folder / "collected_metrics.parquet")
    write_json(folder / "collected.json", collected.manifest)
    print(f"{collected.manifest['runs']} runs, {len(collected.frame)} rows -> {path}")


if __name__ == "__main__":
    arguments.run(main, Config)
