"""Factors a layer by which gradients change, read from frames of the study vanishing."""

from __future__ import annotations

import math

import pandas as pd

import gradscope.meanfield as mf
from experiments.evidence.means import Mean, geometric_mean

ACTIVATIONS = ("sigmoid", "tanh", "relu", "selu")
NORMS = ("none", "batch", "layer")
SIGMOID = ("sigmoid", "none")
NETWORKS = tuple((activation, norm) for activation in ACTIVATIONS for norm in NORMS)
# What the weights of the sigmoid network are multiplied by, besides 1: their variance is the square over n.
SCALES = (2, 4, 8, 16)
# The largest slope of a sigmoid.
SLOPE = 1 / 4


def chosen(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of one quantity."""
    return frame[frame["quantity"] == quantity]


def rate(frame: pd.DataFrame, activation: str, norm: str, scale: int = 1) -> Mean:
    """Factor a layer by which gradients change from the last layer toward the second, geometric mean over seeds.

    Intervals hold together for all networks, or for all larger weights.
    """
    table = lengths(frame, activation, norm, scale).to_numpy()
    factors = 10 ** ((table[:, 1] - table[:, -1]) / (table.shape[1] - 2))
    return geometric_mean(factors, comparisons=len(NETWORKS) if scale == 1 else len(SCALES))


def lengths(frame: pd.DataFrame, activation: str, norm: str, scale: int = 1) -> pd.DataFrame:
    """log10 of the gradient of the weights, seeds x layers."""
    rows = chosen(frame[(frame["activation"] == activation) & (frame["norm"] == norm)], "gradient_norm")
    rows = rows[rows["layer"].str.startswith("layers.") & (rows["weight_scale"] == scale)]
    return rows.pivot_table(index="seed", columns="index", values="log10_value", observed=True)


def in_theory(scale: float) -> float:
    """sqrt(v E[s'^2]) of a sigmoid layer at the length that settles, v the square of the scale."""
    layer = mf.MeanField("sigmoid", scale**2)
    return math.sqrt(float(layer.chi(layer.fixed_length())))


def layers(frame: pd.DataFrame) -> int:
    """Layers of the networks."""
    return lengths(frame, *SIGMOID).shape[1]
