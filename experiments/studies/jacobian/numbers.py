"""Rates, slopes and ranks, read from the frame of the study jacobian."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch

from experiments.evidence import means
from experiments.evidence.means import Mean

# Networks with Gaussian weights, and networks of rotations, whose singular values are known.
GAUSSIAN = ("linear", "tanh", "selu")
ROTATIONS = ("orthogonal", "expanding")
DEEP = (*GAUSSIAN, *ROTATIONS)
# Steps used for the fit of the error: small enough for first order, large enough for the rounding of float64.
FITTED = (1e-4, 1e-2)


def rows_of(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of one quantity."""
    return frame[frame["quantity"] == quantity]


def by_depth(frame: pd.DataFrame, model: str, quantity: str) -> pd.DataFrame:
    """Values of one quantity for one network, as a table of shape (seeds, layers)."""
    rows = rows_of(frame[frame["model"] == model], quantity)
    return rows.pivot_table(index="seed", columns="index", values="value", observed=True)


def rate(frame: pd.DataFrame, model: str, quantity: str) -> Mean:
    """Mean change per layer over the half of the layers farther from the input."""
    values = by_depth(frame, model, quantity).to_numpy()
    begin = values.shape[1] // 2 - 1  # layer L / 2 of L layers; column 0 is layer 1
    return means.mean((values[:, -1] - values[:, begin]) / (values.shape[1] - 1 - begin))


def slope(frame: pd.DataFrame) -> Mean:
    """Slope of ln error against ln step, one fit per seed."""
    rows = rows_of(frame, "linearization_error")
    rows = rows[rows["step"].between(FITTED[0] * 0.99, FITTED[1] * 1.01)]
    fits = [np.polyfit(np.log(r["step"]), np.log(r["value"]), 1)[0] for _, r in rows.groupby("seed", observed=True)]
    return means.mean(fits)


def area_error(frame: pd.DataFrame) -> Mean:
    """Relative difference between |det J| and the factor by which the network scales the smallest square."""
    areas = rows_of(frame, "area")
    smallest = areas[areas["step"] == areas["step"].min()].set_index("seed")["value"]
    return means.mean((smallest / rows_of(frame, "determinant").set_index("seed")["value"] - 1).abs())


def last_rank(frame: pd.DataFrame, model: str) -> Mean:
    """Effective rank at the last layer."""
    return means.mean(by_depth(frame, model, "effective_rank").iloc[:, -1])


def width(frame: pd.DataFrame) -> int:
    """Width of the deep networks."""
    return int(frame.loc[frame["model"] == DEEP[0], "width"].iloc[0])


def gaussian_log_volume(n: int) -> float:
    """E ln|det W| / n of an n x n Gaussian matrix W with variance 1 / n, as a sum over chi-square variables."""
    i = torch.arange(1, n + 1, dtype=torch.float64)
    return float((torch.digamma(i / 2) + math.log(2 / n)).mean() / 2)
