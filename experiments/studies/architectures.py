"""Who explodes at initialization, and who becomes nearly linear?"""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments import drawing, report
from experiments.collect import Collected
from experiments.study import Claim
from experiments.summaries import Mean, geometric_mean
from gradscope import plots

QUESTION = "Which plain networks explode at initialization, and which become nearly linear?"
METHOD = """
Seven networks of depth 50 and width 100 on a batch of 100 samples of Gaussian noise, eight initializations each.

- **GSC** of every layer to the output, exact, and its growth rate a layer over the half nearer the output, with a 95 %
  interval over seeds.
- **Pre-activation standard deviation** over samples, and **sign diversity**, the part of samples with the rarer sign:
  small values of either hint at a layer that is linear over the data.
- **Linear fit error**, which measures that directly: the part of the variance of phi(h) that the best line for each
  neuron leaves over. A network is called nearly linear here where its last layer keeps less than a tenth of the error
  of its first.
- **Nonlinearity coefficient** (NLC, arXiv:1806.00179) of the whole network: 1 for an affine map.

The claims are those of G. Philipp, D. Song and J. Carbonell, "The exploding gradient problem demystified"
(arXiv:1712.05577).
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t; of linear fit errors and NLC those of the geometric mean. The
rates hold for these sizes (`depth_width` varies them) and on Gaussian noise; `architectures_cifar10` repeats them on
images. Nothing here says how the networks train.
"""

EXPLODING = ("relu_batch", "tanh_layer", "tanh_batch", "selu")
STABLE = ("relu", "relu_layer", "tanh")
# The part of the first layer's linear fit error that is left in the last.
KEPT = 0.1


def figures(collected: Collected) -> dict[str, Figure]:
    """The generic ones, and the linear fit error."""
    frame = collected.frame
    keys = report.network_keys(frame)
    made = drawing.draw(frame, keys, report.growth_table(frame, keys), drawing.describe(collected))
    made["linear_fit_error"], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    plots.statistic(frame, "linear_fit_error", log10=True, hue=keys[0], style=keys[1], ax=ax)
    ax.set_title(f"{drawing.describe(collected)}\n{drawing.spread(frame)}", fontsize=10)
    return made


def claims(collected: Collected) -> list[Claim]:
    """Verdicts of growth, pseudo-linearity, and what NLC sees."""
    frame = collected.frame
    growth = report.growth_table(frame, ["model"]).set_index("model")
    relu, tanh = (_nlc(frame, model) for model in ("relu", "tanh"))
    return [
        *(_growth(growth, model, "explodes", "exploding") for model in EXPLODING),
        *(_growth(growth, model, "neither explodes nor vanishes", "stable") for model in STABLE),
        *(_linearity(frame, model, nearly=True) for model in STABLE),
        *(_linearity(frame, model, nearly=False) for model in EXPLODING),
        Claim(
            "GSC does not see that ReLU collapses its data; the nonlinearity coefficient does",
            str(growth.loc["relu", "verdict"]) == "stable" and relu.low > 2,
            f"relu: {float(growth['rate']['relu']):.3f} a layer, NLC {relu:.3g}; tanh, linear without a collapse, has "
            f"NLC {tanh:.3g}",
        ),
    ]


def answer(collected: Collected) -> str:
    """Rates and the price of stability."""
    growth = report.growth_table(collected.frame, ["model"]).set_index("model")
    rates = ", ".join(f"{_name(model)} {float(growth['rate'][model]):.3f}" for model in EXPLODING)
    kept = ", ".join(f"{_name(model)} {_kept(collected.frame, model).value:.2g}" for model in STABLE)
    return (
        f"The networks that keep their layers nonlinear explode (GSC a layer: {rates}); those that do not explode pay "
        f"with layers that are nearly linear over the data (linear fit error of the last layer as a part of the "
        f"first's: {kept})."
    )


def _growth(growth: pd.DataFrame, model: str, says: str, verdict: str) -> Claim:
    row = growth.loc[model].to_dict()
    return Claim(
        f"{_name(model)} {says}",
        None if row["verdict"] == "irregular" else row["verdict"] == verdict,
        f"rate {row['rate']:.3f} ({row['rate_low']:.3f} to {row['rate_high']:.3f}) a layer, {row['verdict']}; "
        f"mean field {row['theory']:.3f}",
    )


def _linearity(frame: pd.DataFrame, model: str, *, nearly: bool) -> Claim:
    kept, last = _kept(frame, model), geometric_mean(_errors(frame, model).iloc[:, -1])
    found = True if kept.high < KEPT else False if kept.low > KEPT else None
    return Claim(
        f"{_name(model)} {'becomes nearly linear over its data' if nearly else 'keeps its layers nonlinear'}",
        None if found is None else found is nearly,
        f"linear fit error of the last layer {last:.2g}, {kept:.2g} of the first's",
    )


def _errors(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    """Linear fit errors, seeds x layers."""
    rows = frame[(frame["quantity"] == "linear_fit_error") & (frame["model"] == model)]
    return rows.pivot_table(index="seed", columns="index", values="value", observed=True)


def _kept(frame: pd.DataFrame, model: str) -> Mean:
    errors = _errors(frame, model)
    return geometric_mean(errors.iloc[:, -1] / errors.iloc[:, 0])


def _nlc(frame: pd.DataFrame, model: str) -> Mean:
    return geometric_mean(frame.loc[(frame["quantity"] == "nlc") & (frame["model"] == model), "value"])


def _name(model: str) -> str:
    return model.replace("_", "+")
