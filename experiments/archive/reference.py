"""Reference results of a study: small enough to commit, complete enough to redraw every figure.

``data.csv`` holds the columns that vary from row to row, and ``manifest.json`` those that are constant, overall or for
each model.  ``value`` is computed from ``log10_value``.  ``metrics.csv`` holds the records of training.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.files import write_json
from gradscope import files, frames
from gradscope.files import written

RECORDED = (
    "step", "epoch", "train_loss", "learning_rate", "images_per_second", "test_accuracy", "test_loss", "test_bits",
    "test_accuracy_mirrored",
)  # fmt: skip
FORMATS = {
    "value": ".10g", "log10_value": ".4f", "log10_stderr_probe": ".2g", "log10_stderr_sample": ".2g",
    "stderr_sample": ".2g",
}  # fmt: skip
SPARSE = ("value", "stderr_sample")
DATA, METRICS = "data.csv", "metrics.csv"


def save(collected: Collected, folder: Path) -> None:
    """Write all files: logarithms with 4 decimals, values with 10 digits, training records with 6, errors with 2."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = collected.frame.drop(columns=list(frames.OPTIONAL), errors="ignore")
    config = [name for name in frame.columns if name not in frames.SCHEMA and name != "model"]
    constants = {name: _plain(frame[name].iloc[0]) for name in config if frame[name].nunique(dropna=False) == 1}
    by_model = frame.groupby("model", observed=True, sort=False)
    varying = [name for name in config if name not in constants]
    own = [name for name in varying if (by_model[name].nunique(dropna=False) == 1).all()]
    models = {str(model): {name: _plain(rows[name].iloc[0]) for name in own} for model, rows in by_model}
    rows = frame.drop(columns=[*constants, *own])
    # A value is stored only if its row has no logarithm.
    rows["value"] = rows["value"].where(rows["log10_value"].isna())
    rows = rows.drop(columns=[name for name in SPARSE if rows[name].isna().all()])
    for name, digits in FORMATS.items():
        if name in rows:
            rows[name] = ["" if pd.isna(value) else f"{value:{digits}}" for value in rows[name]]
    written(folder / DATA, lambda temporary: rows.to_csv(temporary, index=False))
    columns = {"constant": constants, "by_model": models}
    write_json(folder / "manifest.json", {**collected.manifest, "columns": columns})
    if (metrics := collected.metrics) is not None:  # the first columns name the network and the seed
        table = metrics[[name for name in (*labels.network_keys(frame), "seed", *RECORDED) if name in metrics]]
        written(folder / METRICS, lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g"))


def load(folder: Path) -> Collected:
    """The data that `save` was given, up to rounding; the frame is checked.  ValueError if a file is damaged."""
    try:
        return _load(folder)
    except Exception as error:  # damaged bytes can raise nearly any exception
        raise ValueError(f"The results in {folder} cannot be read ({type(error).__name__}: {error}).") from error


def _load(folder: Path) -> Collected:
    manifest = files.parse_json(files.read_text(folder / "manifest.json"))
    rows = files.read_csv(folder / DATA, frames.TEXT)
    columns: dict[str, Any] = manifest["columns"]
    rows = rows.assign(**{name: math.nan for name in SPARSE if name not in rows})
    rows["value"] = rows["value"].where(rows["log10_value"].isna(), 10.0 ** rows["log10_value"])
    for name, value in columns["constant"].items():
        rows[name] = [value] * len(rows)
    for name in next(iter(columns["by_model"].values())):
        rows[name] = [columns["by_model"][model][name] for model in rows["model"]]
    path = folder / METRICS
    metrics = files.read_csv(path, {}) if path.is_file() else None
    return Collected(frames.check(frames.typed(rows)), metrics, manifest)


def _plain(value: Any) -> Any:
    """The JSON value of a NumPy scalar; any null becomes None."""
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value
