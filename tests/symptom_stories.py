"""Runs whose story is known, as the study of exploding symptoms keeps them."""

import math

import numpy as np
import pandas as pd

from experiments import symptoms
from experiments.collect import Collected
from experiments.study import observed


def kept(*found):
    """What `symptoms.condensed` would keep of runs, each a dict of its steps; what is not given never came."""
    names = ["failure_step", "nan_step", *(f"first_{name}" for name in symptoms.THRESHOLDS)]
    runs = pd.DataFrame(
        [
            dict.fromkeys(names, math.inf)
            | {"log10_gsc_at_start": 1.0, "last_loss": 1.0, "lr": 0.1, "seed": 0, "model": "net"}
            | row
            for row in found
        ]
    )
    keys = {key: runs[key].to_numpy() for key in symptoms.KEYS}
    parts = [observed(name, runs[name], step=0, **keys) for name in (*names, "log10_gsc_at_start", "last_loss")]
    frame = pd.concat(parts, ignore_index=True)
    return Collected(frame.assign(norm=np.where(frame["model"] == "normed", "layer", "none")), None, {})
