"""Signals that warn of exploding training: when each signal passes its threshold, and when a run fails."""

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
from gradscope.monitor.alarms import EXTREME_LOG10, LOSS_JUMP, WEIGHT_GROWTH

KEYS = ["model", "lr", "seed"]
GUESSING = math.log(10)
FAILURE, LEARNED = 10 * GUESSING, 0.5 * GUESSING
GRADIENT_JUMP, GSC_JUMP, LARGE_UPDATE = 10.0, 10.0, 0.1
THRESHOLDS = {
    "loss_jump": LOSS_JUMP,
    "gradient_jump": GRADIENT_JUMP,
    "update": LARGE_UPDATE,
    "weight_growth": WEIGHT_GROWTH,
    "gsc": 10.0**EXTREME_LOG10,
    "gsc_jump": GSC_JUMP,
}
WORDS = {name: name.replace("_", " ").replace("gsc", "GSC") for name in THRESHOLDS}
# When each signal fires. The recent median is defined in the method of the study.
MEANINGS = {
    "loss_jump": f"the loss is above {LOSS_JUMP:g} times its recent median",
    "gradient_jump": f"the norm of the gradient of all weights is above {GRADIENT_JUMP:g} times its recent median",
    "update": f"one step changes the weights of a layer by more than {LARGE_UPDATE:g} times their norm",
    "weight_growth": f"the weights of a layer have more than {WEIGHT_GROWTH:g} times their initial norm",
    "gsc": f"GSC from some layer to the logits is above 10^{EXTREME_LOG10:g}",
    "gsc_jump": f"the largest GSC from any layer to the logits is above {GSC_JUMP:g} times its recent median",
}


def condensed(collected: Collected) -> Collected:
    """The steps at which each run fails and each signal fires, and all steps of one run for a figure.

    This run is the one that fails last, among runs that end in NaN if there are any.
    """
    assert collected.metrics is not None
    table = series(collected.frame, collected.metrics)
    found = first_steps(table)
    config = [name for name in collected.frame.columns if name not in (*frames.SCHEMA, "step")]
    about = collected.frame[config].drop_duplicates(KEYS).set_index(KEYS, drop=False).loc[found.index]
    columns: dict[str, Any] = {str(name): about[name].to_numpy() for name in about}
    parts = [observed(str(name), found[name], step=0, **columns) for name in found]
    failing, ended = (found[np.isfinite(found[end])] for end in ("failure_step", "nan_step"))
    if len(failing):
        example = (ended if len(ended) else failing)["failure_step"].idxmax()
        steps = table.groupby(level=KEYS, observed=True).get_group(example).droplevel([*KEYS])
        own = {name: values[found.index == example][0] for name, values in columns.items()}
        known = (steps[name].dropna() for name in ("loss", *THRESHOLDS))
        parts += [observed(str(one.name), one, step=one.index, **own) for one in known if len(one)]
    metrics = collected.metrics.sort_values("step").groupby(KEYS, observed=True, sort=False).tail(1)
    return replace(collected, frame=pd.concat(parts, ignore_index=True), metrics=metrics)


def series(frame: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Loss, signals and "start" (the largest log10 GSC at step 0), with one row per (model, lr, seed, step)."""
    # The record after a step contains the loss at the beginning of the step. The monitor checks this loss.
    losses = metrics.assign(step=metrics["step"] - 1).set_index([*KEYS, "step"])["train_loss"].sort_index()
    made = pd.DataFrame({"loss": losses})
    made["loss_jump"] = jump(made["loss"], KEYS)
    gradient = by_layer(frame, "gradient_norm", made.index, KEYS)
    made["gradient_jump"] = jump(gradient.pow(2).sum(axis=1).pow(0.5), KEYS)
    made["update"] = by_layer(frame, "update_to_weight", made.index, KEYS).max(axis=1)
    lengths = by_layer(frame, "weight_norm", made.index, KEYS)
    made["weight_growth"] = (lengths / lengths.groupby(level=KEYS, observed=True).transform("first")).max(axis=1)
    coefficients = frame[frame["quantity"] == "gsc"].groupby([*KEYS, "step"], observed=True)["log10_value"].max()
    made["gsc"] = 10.0 ** coefficients.reindex(made.index)
    made["gsc_jump"] = jump(made["gsc"], KEYS)
    made["start"] = np.log10(made["gsc"].groupby(level=KEYS, observed=True).transform("first"))
    return made


def first_steps(table: pd.DataFrame) -> pd.DataFrame:
    """One row per run: failure_step, nan_step, first_SIGNAL (inf means never), log10_gsc_at_start and last_loss."""
    nan = ~np.isfinite(table["loss"])
    passed = {"failure_step": nan | (table["loss"] > FAILURE), "nan_step": nan}
    passed |= {f"first_{name}": table[name] > threshold for name, threshold in THRESHOLDS.items()}
    own = table.groupby(level=KEYS, observed=True)
    last = own["loss"].agg(lambda losses: losses.iloc[-1])  # even if it is NaN
    found = alarms.first_steps(passed, KEYS)
    return found.assign(log10_gsc_at_start=own["start"].first(), last_loss=last.fillna(math.inf))


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The numbers that `condensed` keeps of each run, one row per run."""
    rows = frame[frame["quantity"].str.startswith(("failure_step", "nan_step", "first_", "log10_gsc", "last_loss"))]
    return rows.pivot_table(index=KEYS, columns="quantity", values="value", observed=True)


def leads(found: pd.DataFrame, end: str = "failure_step") -> pd.DataFrame:
    """Steps from each signal to ``end``; NaN if the signal did not fire before the failure."""
    return alarms.leads(found, THRESHOLDS, end)


def quiet(found: pd.DataFrame, *, learned: bool = False) -> pd.DataFrame:
    """Whether each signal fired, for runs that did not fail; with ``learned``, only for runs that also learned."""
    return alarms.quiet(found[(found["last_loss"] < LEARNED) | (not learned)], THRESHOLDS)
