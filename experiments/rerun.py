"""Is a result what the same configuration gives again?

python -m experiments.rerun RUN_FOLDER
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import measure, run, train
from experiments.files import read_json
from experiments.manifest import cpu, provenance
from experiments.measure import CONF
from gradscope import frames

# Largest difference of a log10 between machines: float32 sums in another order move a coefficient by about 1e-5.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
# Two trainings drift apart, step by step, once a sum is rounded otherwise.
TRAINING_TOLERANCE = 0.5


@dataclass(frozen=True)
class Comparison:
    """The largest difference of a log10 between two frames of the same rows; 0 is bit for bit."""

    largest: float
    allowed: float
    why: str

    @property
    def same(self) -> bool:
        """Whether it is within what is allowed."""
        return self.largest <= self.allowed


def again(folder: Path) -> Comparison:
    """Repeat the run of a folder from its manifest, elsewhere, and compare.

    Raises:
        FileNotFoundError: The folder has no manifest or no frame.
        ValueError: The repeated run has other rows.
    """
    manifest = read_json(folder / "manifest.json")
    if manifest is None or "choices" not in manifest:
        raise FileNotFoundError(f"{folder} has no manifest that says what was run; runs write one when they end.")
    trained = "train" in manifest["config"]
    cfg = _configuration(manifest["config"], CONF / f"{'train' if trained else 'measure'}.yaml")
    path = folder / ("monitor.parquet" if trained else "frame.parquet")
    before = frames.load(path)
    torch.set_num_threads(manifest["hardware"]["num_threads"])
    after = _trained(cfg, manifest["choices"]) if trained else measure.measure_seeds(cfg, manifest["choices"])[1]
    return compare(before, after, *_allowed(manifest, cfg, trained))


def compare(before: pd.DataFrame, after: pd.DataFrame, allowed: float, why: str) -> Comparison:
    """Row by row.

    Raises:
        ValueError: Their rows are not those of the same layers and quantities.
    """
    names = [name for name in ("step", "seed", "layer", "target", "quantity") if name in before]
    rows = [frame[names].astype("string").fillna("").reset_index(drop=True) for frame in (before, after)]
    if len(before) != len(after) or not rows[0].equals(rows[1]):
        raise ValueError(f"The repeated run has other rows: {len(after)} instead of {len(before)}, or other layers.")
    largest = 0.0
    for name in ("log10_value", "value"):
        a, b = (frame[name].to_numpy(dtype=np.float64) for frame in (before, after))
        used = np.isfinite(a) if name == "log10_value" else np.isfinite(a) & before["log10_value"].isna().to_numpy()
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            largest = math.inf
        elif used.any():
            largest = max(largest, float(np.abs(a[used] - b[used]).max()))
    return Comparison(largest, allowed, why)


def _configuration(config: dict[str, Any], defaults: Path) -> DictConfig:
    """As the manifest has it; a key that is younger than the run has its default, which is what it did then."""
    values = yaml.safe_load(defaults.read_text())
    known = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    merged = OmegaConf.merge(known, config)
    assert isinstance(merged, DictConfig)
    return merged


def _trained(cfg: DictConfig, choices: dict[str, Any]) -> pd.DataFrame:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train.train(cfg, folder, run.device(cfg.device), Console(quiet=True), run.columns(cfg, choices))
        return frames.load(folder / "monitor.parquet")


def _allowed(manifest: dict[str, Any], cfg: DictConfig, trained: bool) -> tuple[float, str]:
    """How far apart the two may be, and why."""
    here = {"cpu": cpu(), "device": str(run.device(cfg.device)), "torch": provenance()["versions"]["torch"]}
    there = {
        **{key: manifest["hardware"].get(key) for key in ("cpu", "device")},
        "torch": manifest["versions"]["torch"],
    }
    if here == there and here["device"] == "cpu":
        return 0.0, "the same processor, number of threads and torch"
    other = ", ".join(f"{key} {there[key]} then, {here[key]} now" for key in here if here[key] != there[key])
    tolerance = TRAINING_TOLERANCE if trained else TOLERANCE[cfg.dtype]
    return tolerance, other or "sums on this device are not in a fixed order"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the comparison; exit with 1 where the results differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path)
    options = parser.parse_args(arguments)
    try:
        found = again(options.folder)
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"Error: {error}")
    how = "bit for bit the same" if found.largest == 0 else f"largest difference of a log10: {found.largest:.3g}"
    print(f"{'Reproduced' if found.same else 'NOT reproduced'}: {how} (allowed: {found.allowed:g}; {found.why}).")
    sys.exit(not found.same)


if __name__ == "__main__":
    main()
