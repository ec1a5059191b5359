"""Chains of single sigmoid units: a short chain differentiated by hand, and long chains with their bound."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import gradscope as gs
from experiments.evidence.words import table
from gradscope.frames import observed
from gradscope.measures import GradientNorm

# Input, target and weights of the chain by hand. None of them is a special value.
INPUT, TARGET, WEIGHTS = 0.7, 0.9, (0.8, -1.3, 1.7)
# Weight and bias of long chains. The second choice keeps the units near their largest slope.
LONG = {"w = 1, b = 0": (1.0, 0.0), "w = 8, b = -4": (8.0, -4.0)}
UNITS = 30
DERIVATIVES = ("dE/dw1", "dE/dw2", "dE/dw3")


def by_hand(x: float, target: float, weights: tuple[float, float, float]) -> dict[str, float]:
    """The derivatives of E = (t - y)^2 / 2 by the chain rule, with all intermediate results in order."""
    w1, w2, w3 = weights
    a1 = 1 / (1 + math.exp(-w1 * x))
    a2 = 1 / (1 + math.exp(-w2 * a1))
    y = 1 / (1 + math.exp(-w3 * a2))
    d3 = -(target - y) * y * (1 - y)
    d2 = d3 * w3 * a2 * (1 - a2)
    d1 = d2 * w2 * a1 * (1 - a1)
    way = {"a1": a1, "a2": a2, "y": y, "E": 0.5 * (target - y) ** 2, "d3": d3, "d2": d2, "d1": d1}
    return way | dict(zip(DERIVATIVES, (d1 * x, d2 * a1, d3 * a2), strict=True))


def compared() -> pd.DataFrame:
    """Derivatives by hand and by autograd, and the larger of the relative errors of autograd and `gs.measure`."""
    chain = nn.Sequential(*(part for _ in WEIGHTS for part in (nn.Linear(1, 1, bias=False), nn.Sigmoid()))).double()
    with torch.no_grad():
        for parameter, weight in zip(chain.parameters(), WEIGHTS, strict=True):
            parameter.fill_(weight)
    # The sample is repeated, because gradient statistics need two samples. This does not change the mean.
    x, target = (torch.full((2, 1), value, dtype=torch.float64) for value in (INPUT, TARGET))

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        return 0.5 * (wanted - output).square().sum(dim=1)

    lengths = gs.measure(chain, (x, target), loss_fn=loss, measures=[GradientNorm()])["value"].to_numpy()
    gradients = torch.autograd.grad(loss(chain(x), target).mean(), list(chain.parameters()))
    found = np.array([float(gradient) for gradient in gradients])
    way = by_hand(INPUT, TARGET, WEIGHTS)
    expected = np.array([way[name] for name in DERIVATIVES])
    difference = np.maximum(np.abs(found / expected - 1), np.abs(lengths / np.abs(expected) - 1))
    parts = [
        observed("by_hand", list(way.values()), layer=list(way), index=np.arange(len(way))),
        observed("by_autograd", found, layer=DERIVATIVES, index=[1, 2, 3]),
        observed("relative_difference", difference, layer=DERIVATIVES, index=[1, 2, 3]),
    ]
    return pd.concat(parts, ignore_index=True)


def long_chain(name: str) -> pd.DataFrame:
    """log10 |dh_L / dh_0| of h <- s(w h + b), h_0 = 1/2, for L = 1 to `UNITS`, and log10 of its bound (|w| / 4)^L."""
    weight, bias = LONG[name]
    first = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    h, logarithms = first, []
    for _ in range(UNITS):
        h = torch.sigmoid(weight * h + bias)
        (slope,) = torch.autograd.grad(h, first, retain_graph=True)
        logarithms.append(math.log10(abs(float(slope))))
    index = np.arange(1, UNITS + 1)
    found = {"log10_chain": np.array(logarithms), "log10_chain_bound": index * math.log10(abs(weight) / 4)}
    parts = [observed(quantity, values, layer=name, index=index) for quantity, values in found.items()]
    return pd.concat(parts, ignore_index=True)


def rows(frame: pd.DataFrame, quantity: str, chain: str) -> pd.Series:
    """A quantity of a long chain by number of units. The chains are the same in all runs."""
    own = frame[(frame["quantity"] == quantity) & (frame["layer"] == chain)]
    return own.groupby("index", observed=True)["value"].first()


def last(frame: pd.DataFrame, quantity: str, chain: str) -> float:
    """A quantity of a long chain at its last unit."""
    return float(rows(frame, quantity, chain).iloc[-1])


def excess(frame: pd.DataFrame, chain: str) -> float:
    """Largest value of log10 of the derivative minus log10 of its bound, over all units of a chain."""
    return float((rows(frame, "log10_chain", chain) - rows(frame, "log10_chain_bound", chain)).max())


def by_hand_table(frame: pd.DataFrame) -> str:
    """A Markdown table of the numbers of the chain by hand, in order of computation."""
    first = frame.drop_duplicates(["quantity", "layer"])
    hand, auto = (
        first[first["quantity"] == name].set_index("layer")["value"].to_dict() for name in ("by_hand", "by_autograd")
    )
    rows = [[name, f"{value:.10g}", f"{auto[name]:.10g}" if name in auto else ""] for name, value in hand.items()]
    return table(["number", "by hand", "automatic"], rows)
