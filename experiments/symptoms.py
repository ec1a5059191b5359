"""Signals that warn of training that explodes: when each passed its threshold, and when the loss failed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd

from experiments.collect import Collected
from experiments.study import observed
from gradscope import frames
from gradscope.alarms import EXTREME_LOG10, FEWEST, LOSS_JUMP, RECENT, WEIGHT_GROWTH

KEYS = ["model", "lr", "seed"]
FAILURE = 10 * math.log(10)
THRESHOLDS = {
    "loss_jump": LOSS_JUMP,
    "gradient_jump": 10.0,
    "update": 0.1,
    "weight_growth": WEIGHT_GROWTH,
    "gsc": 10.0**EXTREME_LOG10,
}


def condensed(collected: Collected) -> Collected:
    """Of every run when it failed and when each signal passed its threshold; every step of the run that failed last."""
    assert collected.metrics is not None
    table = series(collected.frame, collected.metrics)
    found = first_steps(table)
    config = [name for name in collected.frame.columns if name not in (*frames.COLUMNS, "step")]
    about = collected.frame[config].drop_duplicates(KEYS)
    failed = found["failure_step"][np.isfinite(found["failure_step"])]
    last = failed.idxmax() if len(failed) else None
    parts = []
    for run, row in zip(found.index, found.to_dict("records"), strict=True):
        own_config = about[(about[KEYS] == list(run)).all(axis=1)].iloc[0]
        columns = {str(name): value for name, value in own_config.items()}
        own = [observed(str(name), value, step=0) for name, value in row.items()]
        if run == last:
            steps = table.xs(last).drop(columns="start")
            own += [observed(str(name), part, step=part.index) for name in steps if len(part := steps[name].dropna())]
        parts.append(pd.concat(own, ignore_index=True).assign(**columns))
    metrics = collected.metrics.sort_values("step").groupby(KEYS, observed=True, sort=False).tail(1)
    return replace(collected, frame=pd.concat(parts, ignore_index=True), metrics=metrics)


def series(frame: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Loss, signals and "start" (largest GSC at step 0), a row for each (model, lr, seed, step)."""
    index = [*KEYS, "step"]
    # The record after a step is of the loss at its beginning, where the monitor looks.
    losses = metrics.assign(step=metrics["step"] - 1).set_index(index)["train_loss"].sort_index()
    made = pd.DataFrame({"loss": losses})
    made["loss_jump"] = _jump(made["loss"])
    gradient = _layers(frame, "gradient_norm")
    made["gradient_jump"] = _jump(gradient.pow(2).sum(axis=1).pow(0.5).reindex(made.index))
    made["update"] = _layers(frame, "update_to_weight").max(axis=1)
    lengths = _layers(frame, "weight_norm")
    first = lengths.groupby(level=KEYS, observed=True).transform("first")
    made["weight_growth"] = (lengths / first).max(axis=1)
    coefficients = frame[frame["quantity"] == "gsc"].groupby(index, observed=True)["log10_value"].max()
    made["gsc"] = 10.0**coefficients
    made["start"] = coefficients.groupby(level=KEYS, observed=True).transform("first")
    return made


def _layers(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """A column a layer; infinite where a layer's number was not finite and so left out, though others' were."""
    rows = frame[frame["quantity"] == quantity]
    table = rows.pivot_table(index=[*KEYS, "step"], columns="layer", values="value", observed=True, sort=True)
    known = table.groupby(level=KEYS, observed=True).transform("max").notna()
    return table.mask(table.isna() & known, math.inf)


def _jump(values: pd.Series) -> pd.Series:
    """Over the median of those before it in its run, by the rule of the monitor."""
    runs = values.groupby(level=KEYS, observed=True)
    return values / runs.transform(lambda run: run.shift(1).rolling(RECENT, min_periods=FEWEST).median()).clip(1e-12)


def first_steps(table: pd.DataFrame) -> pd.DataFrame:
    """A row a run: failure_step, first_SIGNAL (infinite: never), and log10_gsc_at_start."""
    steps = pd.Series(table.index.get_level_values("step").astype(float), index=table.index)
    passed = {"failure_step": ~np.isfinite(table["loss"]) | (table["loss"] > FAILURE)}
    passed |= {f"first_{name}": table[name] > threshold for name, threshold in THRESHOLDS.items()}
    found = {
        name: steps.where(where, math.inf).groupby(level=KEYS, observed=True).min() for name, where in passed.items()
    }
    return pd.DataFrame(found | {"log10_gsc_at_start": table["start"].groupby(level=KEYS, observed=True).first()})


def runs(frame: pd.DataFrame) -> pd.DataFrame:
    """What `condensed` says of each run, a row a run."""
    rows = frame[frame["quantity"].str.startswith(("failure_step", "first_", "log10_gsc"))]
    return rows.pivot_table(index=KEYS, columns="quantity", values="value", observed=True)


def leads(found: pd.DataFrame) -> pd.DataFrame:
    """Steps from each signal to the failure of the runs that failed; NaN where it did not come before."""
    failed = found[np.isfinite(found["failure_step"])]
    steps = pd.DataFrame({name: failed["failure_step"] - failed[f"first_{name}"] for name in THRESHOLDS})
    return steps.where(steps > 0)
