"""Who explodes at initialization, and who becomes nearly linear?"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments import drawing, report
from experiments.collect import Collected
from experiments.study import Claim
from experiments.summaries import Mean, mean
from gradscope import plots

QUESTION = "Which plain networks explode at initialization, and which become nearly linear?"
METHOD = """
Seven networks of depth 50 and width 100 on a batch of 100 samples of Gaussian noise, eight initializations each.

- **GSC** of every layer to the output, exact, and its growth rate a layer over the half nearer the output with a 95 % interval over seeds.
- **Pre-activation standard deviation** over samples, and **sign diversity**, the part of samples with the rarer sign: small values of either hint at a layer that is linear over the data.
- **Linear fit error**, which measures that directly: the part of the variance of phi(h) that the best line for each neuron leaves over.
- **Nonlinearity coefficient** (NLC, arXiv:1806.00179) of the whole network: 1 for an affine map.

The claims are those of G. Philipp, D. Song, J. Carbonell, "The exploding gradient problem demystified" (arXiv:1712.05577).
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t; the networks of one seed share nothing but their sizes. The rates hold for these widths and this batch size
(batch normalization depends on it, see `depth_width`), on Gaussian noise; `architectures_cifar10` repeats them on images. Nothing here says how the networks train.
"""

EXPLODING = ("relu_batch", "tanh_layer", "tanh_batch", "selu")
STABLE = ("relu", "relu_layer", "tanh")
# Of the variance of a response; half a percent is what the eye calls a straight line.
LINEAR = 0.005


def figures(collected: Collected) -> dict[str, Figure]:
    """The generic ones, and the linear fit error."""
    frame = collected.frame
    keys = report.network_keys(frame)
    made = drawing.draw(frame, keys, report.growth_table(frame, keys), drawing.describe(collected))
    made["linear_fit_error"], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    plots.statistic(frame, "linear_fit_error", hue=keys[0], style=keys[1], ax=ax)
    ax.set(yscale="log", ylabel="variance of $\\phi(h)$ that no line explains")
    ax.set_title(f"{drawing.describe(collected)}\n{drawing.spread(frame)}", fontsize=10)
    return made


def claims(collected: Collected) -> list[Claim]:
    """Verdicts of growth, pseudo-linearity, and what NLC sees."""
    growth = report.growth_table(collected.frame, ["model"]).set_index("model")
    errors = {model: _last(collected.frame, model) for model in growth.index}
    coefficients = {model: _nlc(collected.frame, model) for model in growth.index}
    return [
        *(_verdict(growth, model, "exploding") for model in EXPLODING),
        *(_verdict(growth, model, "stable") for model in STABLE),
        *(
            Claim(
                f"{_name(model)} becomes linear over its data: no more than {LINEAR:.1%} of a response is not",
                True if errors[model].high < LINEAR else False if errors[model].low > LINEAR else None,
                f"linear fit error of the last layer {errors[model]:.2g}",
            )
            for model in STABLE
        ),
        *(
            Claim(
                f"{_name(model)} keeps its nonlinearity",
                True if errors[model].low > LINEAR else False if errors[model].high < LINEAR else None,
                f"linear fit error of the last layer {errors[model]:.2g}",
            )
            for model in EXPLODING
        ),
        Claim(
            "GSC does not see the collapse of ReLU, which the nonlinearity coefficient sees",
            growth.loc["relu", "verdict"] == "stable" and coefficients["relu"].low > 2,
            f"rate {growth.loc['relu', 'rate']:.3f} a layer, NLC {coefficients['relu']:.3g}; tanh, which is linear and does not "
            f"collapse: {coefficients['tanh']:.3g}",
        ),
    ]  # fmt: skip


def answer(collected: Collected) -> str:
    """Rates and the price of stability."""
    growth = report.growth_table(collected.frame, ["model"]).set_index("model")
    rates = ", ".join(f"{_name(model)} {growth.loc[model, 'rate']:.3f}" for model in EXPLODING)
    errors = ", ".join(f"{_name(model)} {_last(collected.frame, model).value:.2g}" for model in STABLE)
    return (
        f"The networks that keep their layers nonlinear explode (GSC a layer: {rates}); those that do not explode pay "
        f"with layers that are nearly linear over the data (linear fit error of the last layer: {errors})."
    )


def _verdict(growth: pd.DataFrame, model: str, expected: str) -> Claim:
    row = growth.loc[model]
    holds = None if row["verdict"] == "irregular" else row["verdict"] == expected
    return Claim(
        f"{_name(model)} {'explodes' if expected == 'exploding' else 'neither explodes nor vanishes'}",
        holds,
        f"rate {row['rate']:.3f} ({row['rate_low']:.3f} to {row['rate_high']:.3f}) a layer, {row['verdict']}; "
        f"mean field {row['theory']:.3f}",
    )


def _last(frame: pd.DataFrame, model: str) -> Mean:
    rows = frame[(frame["quantity"] == "linear_fit_error") & (frame["model"] == model)]
    return mean(rows.loc[rows["index"] == rows["index"].max(), "value"])


def _nlc(frame: pd.DataFrame, model: str) -> Mean:
    return mean(frame.loc[(frame["quantity"] == "nlc") & (frame["model"] == model), "value"])


def _name(model: str) -> str:
    return model.replace("_", "+")
