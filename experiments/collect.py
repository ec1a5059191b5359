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
from experiments.run import write_json
from gradscope import frames


def collect(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """All finished runs below a sweep's folder as one frame, and what their manifests have in common.

    Raises:
        FileNotFoundError: There are none.
    """
    paths = sorted(folder.glob("*/manifest.json"))
    if not paths:
        raise FileNotFoundError(
            f"No finished runs under {folder}: measure first, for example "
            "python -m experiments.measure -m study=architectures"
        )
    frame = pd.concat([frames.load(path.parent / "frame.parquet") for path in paths], ignore_index=True)
    manifests = [json.loads(path.read_text()) for path in paths]
    return frame, {
        "runs": len(paths),
        "seconds": round(sum(manifest["seconds"] for manifest in manifests), 1),
        **{
            key: _distinct([manifest[key] for manifest in manifests])
            for key in manifests[0]
            if key not in ("seconds", "finished")
        },
    }


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
    """Write ``collected.parquet`` and ``collected.json`` into the sweep's folder."""
    folder = Path(cfg.results) / cfg.sweep
    frame, manifest = collect(folder)
    path = frames.save(frame, folder / "collected.parquet")
    write_json(folder / "collected.json", manifest)
    print(f"{manifest['runs']} runs, {len(frame)} rows -> {path}")


if __name__ == "__main__":
    arguments.run(main, Config)
