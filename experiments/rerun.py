"""Is a result what the same configuration gives again?

python -m experiments.rerun RUN_FOLDER
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from experiments import measure, seeds, train
from experiments.archive.differences import Difference, differences, largest, recorded_in_both, worst
from experiments.config import columns as config_columns
from experiments.files import read_json
from experiments.measure import CONF
from experiments.runs.manifest import cpu, provenance
from experiments.runs.outcomes import FRAMES, METRICS
from gradscope import frames

FRAME, MONITOR = FRAMES
# Largest difference of a log10 between machines: float32 sums in another order move a coefficient by about 1e-5.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
# Two trainings drift apart, step by step, once a sum is rounded otherwise.
TRAINING_TOLERANCE = 0.5

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Comparison:
    """Columns that differ between two results of the same rows, and by how much of a log10 they may."""

    found: tuple[Difference, ...]
    allowed: float
    why: str

    @property
    def largest(self) -> float:
        """The largest difference; 0 is bit for bit."""
        return largest(self.found)

    @property
    def same(self) -> bool:
        """Whether it is within what is allowed."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        how = str(worst(self.found)) if self.found else "bit for bit the same"
        return f"{'Reproduced' if self.same else 'NOT reproduced'}: {how} (allowed: {self.allowed:g}; {self.why})."


def again(folder: Path) -> Comparison:
    """Repeat the run of a folder from its manifest, elsewhere, and compare every table that it left.

    Raises:
        FileNotFoundError: The folder has no manifest, or not the tables that such a run leaves.
        ValueError: The repeated run has other rows, or a frame cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run folder {folder}.")
    manifest = read_json(folder / "manifest.json")
    if manifest is None or not {"choices", "config", "hardware", "versions"} <= manifest.keys():
        raise FileNotFoundError(
            f"{folder} has no manifest that says what was run: it is no run folder, or its run failed or is not done."
        )
    trained = "train" in manifest["config"]
    cfg = _configuration(manifest["config"], CONF / f"{'train' if trained else 'measure'}.yaml")
    before = _trained_tables(folder) if trained else _tables(folder, FRAME)
    torch.set_num_threads(manifest["hardware"]["num_threads"])
    if trained:
        after = _trained(cfg, manifest["choices"])
    else:
        after = {FRAME: measure.measure_seeds(cfg, manifest["choices"])[1]}
    return compare(before, after, *_allowed(manifest, cfg, trained))


def compare(before: Tables, after: Tables, allowed: float, why: str) -> Comparison:
    """Row by row and column by column.

    Raises:
        ValueError: A table is missing, or its rows are not those of the same layers, quantities and steps.
    """
    found: list[Difference] = []
    for name, table in before.items():
        if name not in after:
            raise ValueError(f"The repeated run has no {name}.")
        # Which records the monitor's budget of time left out is no result: the repeated run has them all.
        pair = (table, after[name])
        found += differences(*(recorded_in_both(*pair) if name == MONITOR else pair))
    return Comparison(tuple(found), allowed, why)


def _tables(folder: Path, *names: str) -> Tables:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]} to compare with; the run did not come to its end.")
    return {name: frames.load(folder / name) if name in FRAMES else pd.read_parquet(folder / name) for name in names}


def _trained_tables(folder: Path) -> Tables:
    """The records of a training run, and what the monitor saw where there was one."""
    return _tables(folder, METRICS, *([MONITOR] if (folder / MONITOR).is_file() else []))


def _configuration(config: dict[str, Any], defaults: Path) -> DictConfig:
    """As the manifest has it; a key that is younger than the run has its default, which is what it did then."""
    values = yaml.safe_load(defaults.read_text())
    known = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    merged = OmegaConf.merge(known, config)
    assert isinstance(merged, DictConfig)
    return merged


def _trained(cfg: DictConfig, choices: dict[str, Any]) -> Tables:
    columns, cfg = config_columns.columns(cfg, choices), cfg.copy()
    cfg.sinks = []
    cfg.monitor.max_overhead = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train.train(cfg, folder, seeds.device(cfg.device), Console(quiet=True), columns)
        return _trained_tables(folder)


def _allowed(manifest: dict[str, Any], cfg: DictConfig, trained: bool) -> tuple[float, str]:
    """How far apart the two may be, and why."""
    here = {"cpu": cpu(), "device": str(seeds.device(cfg.device)), "torch": provenance()["versions"]["torch"]}
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
    except (OSError, ValueError) as error:
        known = str(options.folder) in str(error)
        sys.exit(f"Error: {error}" if known else f"Error: {options.folder}: {error}")
    print(found)
    sys.exit(not found.same)


if __name__ == "__main__":
    main()
