"""Factors per layer and growth rates, read from the frame of the study vanishing."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

import gradscope.meanfield as mf
from experiments.evidence import means
from experiments.evidence.means import Mean
from experiments.reports import growth as report_growth

ACTIVATIONS = ("sigmoid", "tanh", "relu", "selu")
NORMS = ("none", "batch", "layer")
SIGMOID = ("sigmoid", "none")
NETWORKS = tuple((activation, norm) for activation in ACTIVATIONS for norm in NORMS)
# Scales of the weights of the sigmoid network, in addition to 1. The weight variance is scale^2 / n.
SCALES = (2, 4, 8, 16)
# Largest slope of a sigmoid.
SLOPE = 1 / 4


def chosen(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of one quantity."""
    return frame[frame["quantity"] == quantity]


def rate(frame: pd.DataFrame, activation: str, norm: str, scale: int = 1) -> Mean:
    """Growth per layer of the gradient norm toward the input, with simultaneous intervals over networks or scales."""
    table = norms(frame, activation, norm, scale).to_numpy()
    factors = 10 ** ((table[:, 1] - table[:, -1]) / (table.shape[1] - 2))
    return means.geometric_mean(factors, comparisons=len(NETWORKS) if scale == 1 else len(SCALES))


def norms(frame: pd.DataFrame, activation: str, norm: str, scale: int = 1) -> pd.DataFrame:
    """log10 of the norm of the gradient of the weights, as a table of shape (seeds, layers)."""
    rows = chosen(frame[(frame["activation"] == activation) & (frame["norm"] == norm)], "gradient_norm")
    rows = rows[rows["layer"].str.startswith("layers.") & (rows["weight_scale"] == scale)]
    return rows.pivot_table(index="seed", columns="index", values="log10_value", observed=True)


def in_theory(scale: float) -> float:
    """sqrt(v E[s'^2]) of a sigmoid layer at the fixed point of the length, where v = scale^2."""
    layer = mf.MeanField("sigmoid", scale**2)
    return math.sqrt(float(layer.chi(layer.fixed_length())))


def layers(frame: pd.DataFrame) -> int:
    """Number of layers of the networks."""
    return norms(frame, *SIGMOID).shape[1]


def gsc_growth(frame: pd.DataFrame) -> dict[tuple[str, str], Any]:
    """Measured growth of GSC, by activation and normalization."""
    table = report_growth.growth_table(frame, ["activation", "norm"])
    return {(row["activation"], row["norm"]): row for row in table.to_dict("records")}


def gsc_rates(frame: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Growth rates of GSC that mean field predicts, by activation and normalization."""
    size = int(frame["num_samples"].max())
    return {(a, norm): mf.gsc_rate(a, norm, batch_size=size if norm == "batch" else None) for a, norm in NETWORKS}


def last_deviations(frame: pd.DataFrame, activation: str, norm: str) -> pd.Series:
    """Standard deviation of the pre-activations of the last layer, one per seed."""
    rows = chosen(frame, "preactivation_std")
    last = rows["index"] == rows["index"].max()
    return rows.loc[last & (rows["activation"] == activation) & (rows["norm"] == norm), "value"]
