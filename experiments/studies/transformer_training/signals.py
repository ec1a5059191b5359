"""Signals of a training GPT: when each one passes its threshold, and when a run fails."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from experiments.archive.tables import Collected
from experiments.evidence import alarms
from experiments.evidence.alarms import by_layer, jump
from gradscope import frames
from gradscope.frames import observed

CELL = ["qk_norm", "lr"]
KEYS = [*CELL, "seed"]
GUESSING = math.log(256)
FAILURE = 2 * GUESSING
# Thresholds without and with QK norm: the largest values in runs with the seeds 100 and 101 that did not fail, rounded
# up to two digits.  So no signal fires in these runs, and all signals have similar rates of false alarms.
THRESHOLDS = {
    "loss_jump": (1.2, 1.4),
    "gradient_jump": (9.1, 3.0),
    "attention_logit": (7.8e4, 67.0),
    "entropy": (7.0e7, 14.0),
    "update": (0.53, 0.57),
    "weight_growth": (11.0, 9.2),
    "gsc": (3.7e4, 1.3e5),
}
WORDS = {
    "loss_jump": "loss jump",
    "gradient_jump": "gradient jump",
    "attention_logit": "attention logit",
    "entropy": "entropy",
    "update": "update",
    "weight_growth": "weight growth",
    "gsc": "GSC",
}
# Quantities that `condensed` keeps for every third step.
MOVING = ("loss", "gradient", "attention_logit", "least_entropy", "update", "weight_growth", "log10_gsc")
EVERY = 3


def series(frame: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Loss and signals, with one row per (qk_norm, lr, seed, step)."""
    # The record after a step contains the loss at the beginning of the step. The monitor measures at this time.
    losses = metrics.assign(step=metrics["step"] - 1).set_index([*KEYS, "step"])["train_loss"].sort_index()
    made = pd.DataFrame({"loss": losses})
    index = made.index
    made["loss_jump"] = jump(made["loss"], KEYS)
    made["gradient"] = by_layer(frame, "gradient_norm", index, KEYS).pow(2).sum(axis=1).pow(0.5)
    made["gradient_jump"] = jump(made["gradient"], KEYS)
    made["attention_logit"] = by_layer(_of_layers(frame, "max"), "largest_attention_logit", index, KEYS).max(axis=1)
    least = by_layer(_of_layers(frame, "min"), "relative_attention_entropy", index, KEYS).min(axis=1)
    made["least_entropy"], made["entropy"] = least, 1 / least
    made["update"] = by_layer(frame, "update_to_weight", index, KEYS).max(axis=1)
    lengths = by_layer(frame, "weight_norm", index, KEYS)
    made["weight_growth"] = (lengths / lengths.groupby(level=KEYS, observed=True).transform("first")).max(axis=1)
    coefficients = frame[(frame["quantity"] == "gsc") & (frame["layer"] == "embedding")]
    logarithms = coefficients.set_index([*KEYS, "step"])["log10_value"].reindex(index)
    made["log10_gsc"], made["gsc"] = logarithms, 10.0 ** logarithms.abs()
    return made


def _of_layers(frame: pd.DataFrame, which: str) -> pd.DataFrame:
    """Attention statistics with the largest or smallest value of the heads of each layer."""
    heads = frame[frame["quantity"].isin(["largest_attention_logit", "relative_attention_entropy"])]
    found = heads.groupby([*KEYS, "step", "layer", "quantity"], observed=True)["value"].agg(which)
    return found.reset_index()


def condensed(collected: Collected) -> Collected:
    """The steps at which each run fails and each signal fires, and the quantities `MOVING` at every third step."""
    assert collected.metrics is not None
    table = series(collected.frame, collected.metrics)
    found = first_steps(table)
    config = [name for name in collected.frame.columns if name not in (*frames.SCHEMA, "step", "head")]
    about = collected.frame[config].drop_duplicates(KEYS).set_index(KEYS, drop=False).loc[found.index]
    columns: dict[str, Any] = {str(name): about[name].to_numpy() for name in about}
    parts = [observed(str(name), found[name], step=0, **columns) for name in found]
    steps = table.index.get_level_values("step")
    kept = table[(steps % EVERY == 0) | (steps == steps.max())].replace([np.inf, -np.inf], np.nan)
    whose = about.loc[kept.index.droplevel("step")]
    for name in MOVING:
        known = kept[name].notna().to_numpy()
        own = {str(column): whose[column].to_numpy()[known] for column in whose}
        parts.append(observed(name, kept[name][known], step=kept.index.get_level_values("step")[known], **own))
    last = collected.metrics.sort_values("step").groupby(KEYS, observed=True, sort=False).tail(1)
    return replace(collected, frame=pd.concat(parts, ignore_index=True), metrics=last)


def first_steps(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: failure_step, nan_step and first_SIGNAL (inf means never)."""
    nan = ~np.isfinite(table["loss"])
    passed = {"failure_step": nan | (table["loss"] > FAILURE), "nan_step": nan}
    normed = table.index.get_level_values("qk_norm").to_numpy(bool)
    passed |= {f"first_{name}": table[name] > np.where(normed, *limits[::-1]) for name, limits in THRESHOLDS.items()}
    return alarms.first_steps(passed, KEYS)


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The steps that `condensed` keeps of each run, one row per run."""
    rows = frame[frame["quantity"].str.startswith(("failure_step", "nan_step", "first_"))]
    return rows.pivot_table(index=KEYS, columns="quantity", values="value", observed=True)


def moving(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    """A quantity of `MOVING`: one row per run, one column per step; NaN where it is not finite."""
    rows = frame[frame["quantity"] == name]
    return rows.pivot_table(index=KEYS, columns="step", values="value", observed=True)
