"""Runs whose story is known: as they are recorded, and as the study exploding_symptoms keeps them."""

import math

import numpy as np
import pandas as pd

from experiments.archive.tables import Collected
from experiments.studies.exploding_symptoms import signals
from gradscope.frames import observed

STEPS = 40


def recorded(quantity, layer, values):
    """Rows as the monitor writes them, without non-finite values."""
    values = np.asarray(values, dtype=float)
    steps = np.flatnonzero(np.isfinite(values))
    rows = {"layer": layer, "quantity": quantity, "value": values[steps], "log10_value": np.log10(values[steps])}
    return pd.DataFrame(rows | {"step": steps})


def told(seed=0, model="net", lr=0.1, **changes):
    """A run in which nothing happens except ``changes``: {quantity: values over steps}."""
    flat = np.ones(STEPS)
    story = {"loss": flat, "gradient": flat, "update": 0.01 * flat, "weights": flat, "gsc": 10 * flat} | changes
    parts = [
        recorded("gradient_norm", "first", story["gradient"]), recorded("gradient_norm", "second", flat),
        recorded("weight_norm", "first", 2 * np.asarray(story["weights"])), recorded("weight_norm", "second", flat),
        recorded("update_to_weight", "first", story["update"]).query("step > 0"),
        recorded("gsc", "first", story["gsc"]), recorded("gsc", "second", flat),
    ]  # fmt: skip
    frame = pd.concat(parts, ignore_index=True).assign(model=model, lr=lr, seed=seed, width=50)
    metrics = pd.DataFrame({"model": model, "lr": lr, "seed": seed, "step": np.arange(STEPS) + 1})
    return frame, metrics.assign(train_loss=story["loss"])


def together(*runs):
    return Collected(*(pd.concat(parts, ignore_index=True) for parts in zip(*runs, strict=True)), {})


def from_step(step, value, before=1.0):
    return np.where(np.arange(STEPS) >= step, value, before)


def kept(*found):
    """What `signals.condensed` would keep of runs, each a dict of its steps; other events never happen."""
    names = ["failure_step", "nan_step", *(f"first_{name}" for name in signals.THRESHOLDS)]
    runs = pd.DataFrame(
        [
            dict.fromkeys(names, math.inf)
            | {"log10_gsc_at_start": 1.0, "last_loss": 1.0, "lr": 0.1, "seed": 0, "model": "net"}
            | row
            for row in found
        ]
    )
    keys = {key: runs[key].to_numpy() for key in signals.KEYS}
    parts = [observed(name, runs[name], step=0, **keys) for name in (*names, "log10_gsc_at_start", "last_loss")]
    frame = pd.concat(parts, ignore_index=True)
    return Collected(frame.assign(norm=np.where(frame["model"] == "normed", "layer", "none")), None, {})
