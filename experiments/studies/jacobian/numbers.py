"""TODO docstring."""

from __future__ import annotations

import pandas as pd

from experiments.evidence.means import Mean, mean

# Networks with random Gaussian weights, and rotations, whose singular values are known.
GAUSSIAN = ("linear", "tanh", "selu")
ROTATIONS = ("orthogonal", "expanding")
DEEP = (*GAUSSIAN, *ROTATIONS)


def rows_of(frame: pd.DataFrame, quantity: str, model: str | None = None) -> pd.DataFrame:
    """What was measured of this name, of one model or of all."""
    rows = frame[frame["quantity"] == quantity]
    return rows if model is None else rows[rows["model"] == model]


def by_depth(frame: pd.DataFrame, model: str, quantity: str) -> pd.DataFrame:
    """Seeds x layers."""
    return rows_of(frame, quantity, model).pivot_table(index="seed", columns="index", values="value", observed=True)


def rate(frame: pd.DataFrame, model: str, quantity: str) -> Mean:
    """Change a layer over the half of the layers farther from the input, where what the first do has died away.

    The logarithms of random networks are random walks, whose mean increment is the best estimate of their slope.
    """
    values = by_depth(frame, model, quantity).to_numpy()
    begin = values.shape[1] // 2 - 1  # layer L / 2 of L, for the first is layer 1
    return mean((values[:, -1] - values[:, begin]) / (values.shape[1] - 1 - begin))
