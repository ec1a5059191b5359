"""Reference results of a study: small enough to commit, complete enough to redraw every figure.

``data.csv`` holds what varies from row to row; columns that are the same in all rows, or the same for all rows of one
model, stand in ``manifest.json`` instead, and ``value`` follows from ``log10_value``.  Where networks were trained,
``metrics.csv`` holds the records of training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.files import write_json, written
from gradscope import frames

RECORDED = (
    "step", "epoch", "train_loss", "learning_rate", "images_per_second", "test_accuracy", "test_loss",
)  # fmt: skip
FORMATS = {"log10_value": ".4f", "log10_stderr_probe": ".2g", "log10_stderr_sample": ".2g"}


def save(frame: pd.DataFrame, manifest: dict[str, Any], folder: Path) -> None:
    """Write ``data.csv`` and ``manifest.json``; logarithms keep four decimals, their errors two digits."""
    folder.mkdir(parents=True, exist_ok=True)
    config = [name for name in frame.columns if name not in frames.COLUMNS and name != "model"]
    constants = {name: _plain(frame[name].iloc[0]) for name in config if frame[name].nunique(dropna=False) == 1}
    by_model = frame.groupby("model", observed=True, sort=False)
    varying = [name for name in config if name not in constants]
    own = [name for name in varying if (by_model[name].nunique(dropna=False) == 1).all()]
    models = {str(model): {name: _plain(rows[name].iloc[0]) for name in own} for model, rows in by_model}
    rows = frame.drop(columns=[*constants, *own, "value"])
    if rows["stderr_sample"].isna().all():
        rows = rows.drop(columns="stderr_sample")
    for name, digits in FORMATS.items():
        rows[name] = ["" if pd.isna(value) else f"{value:{digits}}" for value in rows[name]]
    written(folder / "data.csv", lambda temporary: rows.to_csv(temporary, index=False))
    write_json(folder / "manifest.json", {**manifest, "columns": {"constant": constants, "by_model": models}})


def save_metrics(metrics: pd.DataFrame, keys: Sequence[str], folder: Path) -> None:
    """Write ``metrics.csv``: what was recorded of each run, six digits; ``keys`` and seed tell the runs apart."""
    table = metrics[[name for name in (*keys, "seed", *RECORDED) if name in metrics]]
    written(folder / "metrics.csv", lambda temporary: table.to_csv(temporary, index=False, float_format="%.6g"))


def load_metrics(folder: Path) -> pd.DataFrame | None:
    """What `save_metrics` wrote, None where it wrote nothing."""
    path = folder / "metrics.csv"
    return pd.read_csv(path, keep_default_na=False, na_values=[""]) if path.is_file() else None


def load(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The checked frame that `save` was given, up to digits, and its manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = pd.read_csv(folder / "data.csv", keep_default_na=False, na_values=[""])
    columns: dict[str, Any] = manifest["columns"]
    rows["value"] = 10.0 ** rows["log10_value"]
    for name, value in columns["constant"].items():
        rows[name] = [value] * len(rows)
    for name in next(iter(columns["by_model"].values())):
        rows[name] = [columns["by_model"][model][name] for model in rows["model"]]
    return frames.check(frames.upgraded(rows)), manifest


def _plain(value: Any) -> Any:
    """A NumPy scalar as JSON knows it; any null as None."""
    if pd.isna(value):
        return None
    return value.item() if hasattr(value, "item") else value
