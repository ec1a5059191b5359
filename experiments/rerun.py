"""Repeat a run from its manifest and compare the results.

python -m experiments.rerun results/runs/measure/RUN
python -m experiments.rerun results/runs/measure/RUN --trust     # import code that is not part of this package

A manifest can name any function of any installed package, and rerun calls it: this can run any code.  Functions and
classes that the configurations of this package name, and the classes of torch.nn, torch.optim and gradscope.models,
are called at once.  For others rerun asks before it imports them; without a terminal it refuses.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from experiments import measure, seeds, targets, train
from experiments.archive.differences import Difference, differences, recorded_in_both, worst
from experiments.config import columns as config_columns
from experiments.config import command_line
from experiments.files import read_json
from experiments.program import conf_folders
from experiments.runs import FRAMES, METRICS, cpu, provenance
from gradscope import files, frames
from gradscope.files import printable

FRAME, MONITOR = FRAMES
MOST_NAMES, MOST_THREADS = 250, 1024  # characters of a list of names; threads of a run
# Allowed difference of a log10 between machines.  In float32, the order of sums changes a coefficient by about 1e-5.
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.1}
# After the first sum that is rounded differently, two training runs drift apart step by step.
TRAINING_TOLERANCE = 0.5

Tables = dict[str, pd.DataFrame]


@dataclass
class Config:
    """``folder``: the folder of the run to repeat; the key ``folder=`` can be left out.

    ``trust``: do not ask before code is imported that is not part of this package.
    """

    folder: str = MISSING
    trust: bool = False


@dataclass(frozen=True)
class Comparison:
    """The columns that differ between two results with the same rows, and the allowed difference of a log10."""

    found: tuple[Difference, ...]
    allowed: float
    why: str

    @property
    def largest(self) -> float:
        """The largest difference; 0 if all columns are equal bit for bit."""
        return max((difference.largest for difference in self.found), default=0.0)

    @property
    def same(self) -> bool:
        """Whether the largest difference is allowed."""
        return self.largest <= self.allowed

    def __str__(self) -> str:
        how = str(worst(self.found)) if self.found else "equal bit for bit"
        return f"{'Reproduced' if self.same else 'NOT reproduced'}: {how} (allowed: {self.allowed:g}; {self.why})."


def again(folder: Path, trust: bool = False) -> Comparison:
    """Repeat the run of a folder from its manifest, and compare every table in the folder with the new one.

    ``trust``: import all code that the manifest names, without a question.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run folder {folder}.")
    manifest = read_json(folder / "manifest.json")
    if manifest is None or not {"choices", "config", "hardware", "versions"} <= manifest.keys():
        raise FileNotFoundError(
            f"{folder} has no complete manifest: it is not the folder of a run, or the run has failed or is not done."
        )
    _check(manifest)
    if (names := targets.unknown(manifest["config"])) and not (trust or _agreed(names)):
        raise ValueError(
            f"The manifest names {', '.join(names)[:MOST_NAMES]}, which is not part of this package: rerun would "
            "import and run this code. If you know it and trust it, add --trust."
        )
    trained = "train" in manifest["config"]
    cfg = _configuration(manifest["config"], f"{'train' if trained else 'measure'}.yaml")
    before = _trained_tables(folder) if trained else _tables(folder, FRAME)
    torch.set_num_threads(manifest["hardware"]["num_threads"])
    if trained:
        after = _trained(cfg, manifest["choices"])
    else:
        after = {FRAME: measure.measure_seeds(cfg, manifest["choices"])[1]}
    return compare(before, after, *_allowed(manifest, cfg, trained))


def _check(manifest: dict[str, Any]) -> None:
    """Raise ValueError if an entry of a manifest has a wrong type, or a text would be replaced when it is read."""
    parts = {name: manifest[name] for name in ("choices", "config", "hardware", "versions")}
    if wrong := [name for name, part in parts.items() if not isinstance(part, dict)]:
        raise ValueError(f"{wrong[0]} in the manifest is no object.")
    if not {"model", "data"} <= parts["choices"].keys() or "torch" not in parts["versions"]:
        raise ValueError("The manifest names no model, data or version of torch.")
    number = parts["hardware"].get("num_threads")
    if not isinstance(number, int) or not 0 < number <= MOST_THREADS:
        raise ValueError(f"num_threads in the manifest must be a number from 1 to {MOST_THREADS}, got {number!r}.")
    if "${" in json.dumps(parts["config"]):
        raise ValueError(
            "The configuration in the manifest has an interpolation (${...}). Manifests hold plain values only: an "
            "interpolation could read the environment."
        )


def _agreed(names: list[str]) -> bool:
    """Whether the user, asked on a terminal, wants this code to be imported; without a terminal nobody is asked."""
    if not sys.stdin.isatty():
        return False
    text = f"The manifest names {', '.join(names)}. Importing and running this code can do anything. Go on? [y/N] "
    try:
        return input(printable(text, MOST_NAMES)).strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        return False


def compare(before: Tables, after: Tables, allowed: float, why: str) -> Comparison:
    """Compare tables row by row and column by column."""
    found: list[Difference] = []
    for name, table in before.items():
        if name not in after:
            raise ValueError(f"The repeated run has no {name}.")
        # In the first run, the monitor may have skipped records to save time.  The repeated run has all records.
        pair = (table, after[name])
        found += differences(*(recorded_in_both(*pair) if name == MONITOR else pair))
    return Comparison(tuple(found), allowed, why)


def _tables(folder: Path, *names: str) -> Tables:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{folder} has no {missing[0]} to compare with; the run is not done.")
    return {
        name: frames.load(folder / name) if name in FRAMES else files.read_parquet(folder / name).to_pandas()
        for name in names
    }


def _trained_tables(folder: Path) -> Tables:
    """The tables of a training run, including the table of the monitor if there is one."""
    return _tables(folder, METRICS, *([MONITOR] if (folder / MONITOR).is_file() else []))


def _configuration(config: dict[str, Any], name: str) -> DictConfig:
    """The configuration of a manifest; keys that were added after the run get their defaults."""
    values = yaml.safe_load(next(path for folder in conf_folders() if (path := folder / name).is_file()).read_text())
    known = {key: value for key, value in values.items() if key not in ("defaults", "hydra")}
    return OmegaConf.merge(known, config)  # type: ignore[return-value]


def _trained(cfg: DictConfig, choices: dict[str, Any]) -> Tables:
    columns, cfg = config_columns.columns(cfg, choices), cfg.copy()
    cfg.sinks, cfg.memory_map = [], None  # nothing is written outside the temporary folder
    cfg.monitor.max_overhead = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train.train(cfg, folder, seeds.device(cfg.device), Console(quiet=True), columns)
        return _trained_tables(folder)


def _allowed(manifest: dict[str, Any], cfg: DictConfig, trained: bool) -> tuple[float, str]:
    """The largest allowed difference, and the reason for it."""
    here = {"cpu": cpu(), "device": str(seeds.device(cfg.device)), "torch": provenance()["versions"]["torch"]}
    there = {key: manifest["hardware"].get(key) for key in ("cpu", "device")} | {"torch": manifest["versions"]["torch"]}
    if here == there and here["device"] == "cpu":
        return 0.0, "the same processor, number of threads and torch"
    other = ", ".join(f"{key} {there[key]} then, {here[key]} now" for key in here if here[key] != there[key])
    tolerance = TRAINING_TOLERANCE if trained else TOLERANCE[cfg.dtype]
    return tolerance, other or "sums on this device are not in a fixed order"


def main(cfg: Config) -> None:
    """Print the comparison; exit with code 1 if the run is not reproduced."""
    try:
        found = again(Path(cfg.folder), cfg.trust)
    except Exception as error:  # a manifest from elsewhere can hold anything
        plain = isinstance(error, (OSError, ValueError)) and not isinstance(error, OmegaConfBaseException)
        if plain and cfg.folder in str(error):
            raise
        why = str(error) if plain else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise ValueError(f"{cfg.folder}: {why}") from error
    print(printable(found))
    sys.exit(not found.same)


if __name__ == "__main__":
    command_line.run(main, Config, positional="folder")
