"""Numbers of the study of effective depth, read from its frame."""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd

from experiments.archive.labels import network_name
from experiments.studies.effective_depth.measurement import TOLERANCES

# Above the loss of the whole network; of ten classes guessing costs 2.3.
SUFFERS = 0.1

NETWORK = ["activation", "norm", "residual", "depth"]
Key = tuple[str, str, str, int]


def name(key: Key) -> str:
    """``selu`` or ``tanh+layer, residual``; without the depth."""
    return network_name(key[:2]) + ("" if key[2] == "none" else ", residual")


def trained(frame: pd.DataFrame) -> list[Key]:
    """Networks that learned with some learning rate in every seed, the plain first."""
    losses = frame[frame["quantity"] == "train_loss"].groupby(NETWORK, observed=True, sort=False)["value"]
    keys = [cast(Key, key) for key, values in losses if np.isfinite(values).all()]
    return sorted(keys, key=lambda key: (key[3], key[2] != "none"))


def rows(frame: pd.DataFrame, key: Key, quantity: str) -> pd.DataFrame:
    """Those of one quantity of one network."""
    chosen = frame[frame["quantity"] == quantity]
    for column, value in zip(NETWORK, key, strict=True):
        chosen = chosen[chosen[column] == value]
    return chosen


def by_seed(frame: pd.DataFrame, key: Key, quantity: str, *, tolerance: float | None = None) -> pd.DataFrame:
    """Values of a quantity of one network, steps in rows and seeds in columns."""
    chosen = rows(frame, key, quantity)
    if tolerance is not None:
        chosen = chosen[chosen["tolerance"] == tolerance]
    return chosen.pivot_table(index="step", columns="seed", values="value", observed=True)


def final(frame: pd.DataFrame, key: Key, quantity: str = "effective_depth", *, index: int = 0) -> pd.Series:
    """Of every seed, at the end of training, at the tolerance of that index."""
    tolerance = TOLERANCES[index] if "depth" in quantity else None
    return by_seed(frame, key, quantity, tolerance=tolerance).iloc[-1]


def layers(frame: pd.DataFrame, key: Key) -> int:
    """How many layers of the network have a Jacobian that training may change."""
    return int(rows(frame, key, "change")["index"].max())


def taylor(frame: pd.DataFrame, key: Key) -> pd.DataFrame:
    """Loss above that of the whole network by the number of replaced layers, a column a seed."""
    table = rows(frame, key, "taylor_loss").pivot_table(index="index", columns="seed", values="value", observed=True)
    return table - table.iloc[0]


def replaceable(frame: pd.DataFrame, key: Key) -> pd.Series:
    """Of every seed, the largest number of last layers up to which the loss never suffers."""
    suffers = ~(taylor(frame, key) <= SUFFERS)
    return suffers.idxmax().where(suffers.any(), len(suffers)) - 1
