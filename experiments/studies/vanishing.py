"""Vanishing gradients: a chain by hand, chains of many units, and networks with and without normalization."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
from experiments import report
from experiments.collect import Collected
from experiments.study import Claim, observed
from experiments.summaries import Mean, geometric_mean
from gradscope.measures import GradientNorm

QUESTION = "Do gradients vanish because the slope of a sigmoid is at most 1/4?"
METHOD = """
**By hand.** A chain of two hidden sigmoid units and a sigmoid output, a1 = s(w1 x), a2 = s(w2 a1), y = s(w3 a2), with
the loss E = (t - y)^2 / 2. With s' = s (1 - s) the chain rule gives

- dE/dw3 = -(t - y) y (1 - y) a2
- dE/dw2 = -(t - y) y (1 - y) w3 a2 (1 - a2) a1
- dE/dw1 = -(t - y) y (1 - y) w3 a2 (1 - a2) w2 a1 (1 - a1) x

which is evaluated in plain floating-point arithmetic and compared with what `gs.measure` finds by automatic
differentiation.

**Chains.** L units h <- s(w h + b) in a row: the derivative of the last with respect to the first is a product of L
factors w s', so at most (w / 4)^L. Measured for w = 1, b = 0, and for w = 8, b = -4, which holds the unit where its
slope is largest.

**Networks.** Depth 30 and width 100 with a linear head for ten classes, float64, on 32 samples of Gaussian noise with
random labels: the length of the gradient of the mean cross-entropy with respect to the weights of every layer
(`gs.measure`), its factor a layer between the last layer and the second, from the output toward the input; and the
growth rate of GSC. Initialization he for ReLU, lecun for the others.
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t of the logarithm; the hand-derived chain is exact up to rounding.
The networks are at initialization; widths, depths and weight variances other than these shift the rates, and a sigmoid
network with larger weights need not vanish, as the second chain shows.
"""

ACTIVATIONS = ("sigmoid", "tanh", "relu", "selu")
NORMS = ("none", "batch", "layer")
# The chain by hand: input, target and weights, chosen without a special value.
INPUT, TARGET, WEIGHTS = 0.7, 0.9, (0.8, -1.3, 1.7)
CHAINS = {"w = 1, b = 0": (1.0, 0.0), "w = 8, b = -4": (8.0, -4.0)}
# Of a double: what "digit by digit" can mean.
ROUNDING = 1e-14
# A gradient that changes by more than this a layer does so by more than ten in a network of depth 30.
KEPT = 10 ** (1 / 30)


def by_hand(x: float, target: float, weights: tuple[float, float, float]) -> tuple[float, float, float]:
    """dE/dw of the chain with two hidden units, by the chain rule (`METHOD`)."""
    w1, w2, w3 = weights
    a1 = 1 / (1 + math.exp(-w1 * x))
    a2 = 1 / (1 + math.exp(-w2 * a1))
    y = 1 / (1 + math.exp(-w3 * a2))
    delta3 = -(target - y) * y * (1 - y)
    delta2 = delta3 * w3 * a2 * (1 - a2)
    delta1 = delta2 * w2 * a1 * (1 - a1)
    return delta1 * x, delta2 * a1, delta3 * a2


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> pd.DataFrame:
    """Gradients of every layer and GSC of a network with a head; of a sigmoid network also the chains."""
    with torch.no_grad():
        num_classes = model(x).shape[1]
    y = torch.randint(num_classes, (len(x),), generator=generator)

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(output, labels, reduction="none")

    gradients = gs.measure(model, x, y, loss, measures=[GradientNorm()])
    parts = [gradients, gs.gsc(model, x).to_frame()]
    if any(isinstance(module, nn.Sigmoid) for module in model.modules()):
        parts += [_by_hand(), *(_chain(name, *values) for name, values in CHAINS.items())]
    return pd.concat(parts, ignore_index=True)


def _by_hand() -> pd.DataFrame:
    """The three derivatives by hand, as `gs.measure` has them, and their relative difference."""
    chain = nn.Sequential(*(part for _ in WEIGHTS for part in (nn.Linear(1, 1, bias=False), nn.Sigmoid()))).double()
    with torch.no_grad():
        for parameter, weight in zip(chain.parameters(), WEIGHTS, strict=True):
            parameter.fill_(weight)
    # Twice the same sample, because statistics of gradients compare samples; its mean is the same.
    x, target = (torch.full((2, 1), value, dtype=torch.float64) for value in (INPUT, TARGET))

    def loss(output: Tensor, wanted: Tensor) -> Tensor:
        return 0.5 * (wanted - output).square().sum(dim=1)

    found = gs.measure(chain, x, target, loss, measures=[GradientNorm()])["value"].to_numpy()
    expected = np.abs(by_hand(INPUT, TARGET, WEIGHTS))
    names, index = [f"w{number}" for number in (1, 2, 3)], [1, 2, 3]
    return pd.concat(
        [
            observed("by_hand", expected, layer=names, index=index),
            observed("by_autograd", found, layer=names, index=index),
            observed("relative_difference", np.abs(found / expected - 1), layer=names, index=index),
        ],
        ignore_index=True,
    )


def _chain(name: str, weight: float, bias: float, depth: int = 30) -> pd.DataFrame:
    """log10 |dh_L / dh_0| of L sigmoid units in a row, for L up to ``depth``, from h_0 = 1/2; and of its bound."""
    first = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    h, logarithms = first, []
    for _ in range(depth):
        h = torch.sigmoid(weight * h + bias)
        (slope,) = torch.autograd.grad(h, first, retain_graph=True)
        logarithms.append(math.log10(abs(float(slope))))
    index = np.arange(1, depth + 1)
    bound = index * math.log10(abs(weight) / 4)
    return pd.concat(
        [
            observed("log10_chain", logarithms, layer=name, index=index),
            observed("log10_chain_bound", bound, layer=name, index=index),
        ],
        ignore_index=True,
    )


def figures(collected: Collected) -> dict[str, Figure]:
    """Gradients of every layer, and chains beside their bounds."""
    return {"gradients": _gradients(collected.frame), "chains": _chains(collected.frame)}


def claims(collected: Collected) -> list[Claim]:
    """The hand-derived chain, the bound, and which networks vanish."""
    frame = collected.frame
    difference = float(_rows(frame, "relative_difference")["value"].max())
    rates = {(a, n): rate(frame, a, n) for a in ACTIVATIONS for n in NORMS}
    growth = report.growth_table(frame, ["activation", "norm"]).set_index(["activation", "norm"]).to_dict("index")
    sigmoid, steady = rates["sigmoid", "none"], growth["sigmoid", "none"]
    plain, held = CHAINS
    return [
        Claim(
            "Automatic differentiation gives what the chain rule gives by hand, digit by digit",
            difference < ROUNDING,
            f"largest relative difference of the three derivatives {difference:.1e}",
        ),
        Claim(
            "A chain of L sigmoids with weight 1 shrinks a gradient by 4^-L at least",
            _excess(frame, plain) <= 1e-12,
            f"after 30 units 10^{_last(frame, 'log10_chain', plain):.2f}, the bound is "
            f"10^{_last(frame, 'log10_chain_bound', plain):.2f}",
        ),
        Claim(
            "Whatever the weights, a chain of sigmoids shrinks a gradient",
            _last(frame, "log10_chain", held) < 0,
            f"with weights of 8 and the units held in the middle it grows to "
            f"10^{_last(frame, 'log10_chain', held):.2f} after 30 units",
        ),
        Claim(
            "In a sigmoid network a gradient shrinks to a quarter a layer, or less",
            sigmoid.high < 0.25 if sigmoid.high < 0.25 or sigmoid.low > 0.25 else None,
            f"factor a layer {sigmoid:.4f}",
        ),
        Claim(
            "Measured by GSC a sigmoid network vanishes too, so it is no matter of scale",
            steady["verdict"] == "vanishing",
            f"rate {steady['rate']:.4f} ({steady['rate_low']:.4f} to {steady['rate_high']:.4f}), {steady['verdict']}",
        ),
        *(_keeps("sigmoid", norm, rates["sigmoid", norm]) for norm in ("batch", "layer")),
        *(_keeps(activation, "none", rates[activation, "none"]) for activation in ("tanh", "relu", "selu")),
    ]


def answer(collected: Collected) -> str:
    """The factor a layer of every network, and the chain digit by digit."""
    frame = collected.frame
    plain = ", ".join(f"{name} {rate(frame, name, 'none').value:.3f}" for name in ACTIVATIONS)
    normalized = ", ".join(f"{norm} {rate(frame, 'sigmoid', norm).value:.3f}" for norm in ("batch", "layer"))
    table = ["| | by hand | automatic |", "|---|---|---|"]
    chosen = frame[
        (frame["seed"] == frame["seed"].iloc[0]) & (frame["activation"] == "sigmoid") & (frame["norm"] == "none")
    ]
    by_hand_, by_autograd = (_rows(chosen, name).set_index("layer")["value"] for name in ("by_hand", "by_autograd"))
    table += [f"| abs dE/d{name} | {by_hand_[name]:.10g} | {by_autograd[name]:.10g} |" for name in by_hand_.index]
    return (
        "For small weights yes: the slope bounds the factor of every unit. On its way from the output to the input a "
        f"gradient changes by a factor a layer of {plain}. Normalization spreads the pre-activations of sigmoid "
        f"networks and divides their Jacobians by what the spread was; then the factor is {normalized}. Large weights "
        "undo the bound.\n\n" + "\n".join(table)
    )


def rate(frame: pd.DataFrame, activation: str, norm: str) -> Mean:
    """Factor a layer by which gradients change from the last layer toward the second, geometric mean over seeds."""
    rows = _rows(frame[(frame["activation"] == activation) & (frame["norm"] == norm)], "gradient_norm")
    rows = rows[rows["layer"].str.startswith("layers.")]
    table = rows.pivot_table(index="seed", columns="index", values="log10_value", observed=True).to_numpy()
    return geometric_mean(10 ** ((table[:, 1] - table[:, -1]) / (table.shape[1] - 2)))


def _keeps(activation: str, norm: str, factor: Mean) -> Claim:
    network = report.network_name([activation, norm])
    inside, outside = factor.low > 1 / KEPT and factor.high < KEPT, factor.high < 1 / KEPT or factor.low > KEPT
    return Claim(
        f"The gradients of {network} keep their length within a factor of ten over 30 layers",
        True if inside else False if outside else None,
        f"factor a layer {factor:.3f}, over 30 layers {factor.value**30:.2g}",
    )


def _rows(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return frame[frame["quantity"] == quantity]


def _chain_rows(frame: pd.DataFrame, quantity: str, chain: str) -> pd.Series:
    """By the number of units; every run has the same chains."""
    rows = _rows(frame, quantity)
    return rows[rows["layer"] == chain].groupby("index", observed=True)["value"].first()


def _last(frame: pd.DataFrame, quantity: str, chain: str) -> float:
    return float(_chain_rows(frame, quantity, chain).iloc[-1])


def _excess(frame: pd.DataFrame, chain: str) -> float:
    """By how much log10 of a chain's derivative exceeds its bound, at most."""
    found, bound = (_chain_rows(frame, name, chain) for name in ("log10_chain", "log10_chain_bound"))
    return float((found - bound).max())


def _gradients(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, len(NORMS), figsize=(12.0, 4.2), layout="constrained", sharey=True)
    rows = _rows(frame, "gradient_norm")
    rows = rows[rows["layer"].str.startswith("layers.")]
    for ax, norm in zip(axes, NORMS, strict=True):
        sns.lineplot(
            rows[rows["norm"] == norm], x="index", y="log10_value", hue="activation", hue_order=ACTIVATIONS,
            style="activation", style_order=ACTIVATIONS, errorbar="sd", palette="colorblind", ax=ax,
            legend=norm == "none",
        )  # fmt: skip
        ax.set(title={"none": "no normalization", "batch": "batch normalization", "layer": "layer normalization"}[norm])
        ax.set(xlabel="layer, from the input", ylabel=r"$\log_{10}$ length of the gradient of its weights")
        sns.despine(ax=ax)
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    seeds = frame["seed"].nunique()
    figure.suptitle(
        f"Gradients at initialization, depth 30, width 100; mean over {seeds} seeds, band: one standard deviation",
        fontsize=10,
    )
    return figure


def _chains(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for color, chain in zip(sns.color_palette("colorblind"), CHAINS, strict=False):
        for quantity, style, words in (("log10_chain", "-", "measured"), ("log10_chain_bound", ":", "bound")):
            values = _chain_rows(frame, quantity, chain)
            width = 2.4 if style == ":" else 1.4
            ax.plot(values.index, values, style, color=color, label=f"{chain}: {words}", linewidth=width)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="units L in a row", ylabel=r"$\log_{10} |dh_L / dh_0|$", title="Chains of sigmoid units, exact")
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure
