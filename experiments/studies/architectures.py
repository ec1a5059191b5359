"""Who explodes at initialization, and who becomes nearly linear?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from experiments.reports import growth as report_growth
from experiments.reports import sweep_figures
from gradscope import plots
from gradscope.coefficients.growth import EXPLODING_RATE, VANISHING_RATE

# What is claimed of whom in the literature; the data decide.
EXPLODING = ("relu_batch", "tanh_layer", "tanh_batch", "selu")
STABLE = ("relu", "relu_layer", "tanh")
# The part of the first layer's linear fit error that is left in the last.
KEPT = 0.1
# Of sign diversity: so few samples of the rarer sign that nearly all lie on one side of the kink.
COLLAPSED = 0.1
# Of the nonlinearity coefficient: twice an affine map's.
NONLINEAR = 2.0

QUESTION = "Which plain networks explode at initialization, and which become nearly linear?"
METHOD = f"""
Networks of depth {{model.depth}} and width {{model.width}} with the activations {{model.activation}} and the
normalizations {{model.norm}}, on a batch of {{data.batch_size}} samples of Gaussian noise, {{num_seeds}}
initializations each, {{dtype}}.

- **GSC** of every layer to the output, exact, and its growth rate a layer over the half nearer the output, with a 95 %
  interval over seeds. A network **explodes** where the profile is straight and the interval lies above
  {EXPLODING_RATE:g}, **vanishes** where it lies below {VANISHING_RATE:g}, does **neither** where it lies between them,
  and is undecided otherwise. (The word "stable" in the figure is weaker: an interval around 1 that may be wider.)
- **Pre-activation standard deviation** over samples, and **sign diversity**, the part of samples with the rarer sign:
  small values of either hint at a layer that is linear over the data.
- **Linear fit error**, which measures that directly: the part of the variance of phi(h) that the best line for each
  neuron leaves over. A network has **nearly linear layers** here where its last layer keeps less than {KEPT:g} of the
  error of its first.
- **Nonlinearity coefficient** (NLC, arXiv:1806.00179) of the whole network: 1 for an affine map. It need not agree
  with the former: many layers, each nearly linear, can make a function that is not.

The claims are those of G. Philipp, D. Song and J. Carbonell, "The exploding gradient problem demystified"
(arXiv:1712.05577).
"""
HOW_SURE = """
Intervals are over initializations, 95 %, Student's t, each by itself; of linear fit errors and NLC those of the
geometric mean. The rates hold for these sizes (`depth_width` varies them) and on Gaussian noise;
`architectures_cifar10` repeats them on images, see [results](../../results/README.md). Nothing here says how the
networks train.
"""
CAPTIONS = {
    "gsc": (
        "GSC of every layer against its distance from the output, with rate and verdict of each network. A straight "
        "line is exponential growth; thin lines with markers are mean field, in the color of the network."
    ),
    "preactivation_std": (
        "Standard deviation of the pre-activations over samples, layer by layer. Where it shrinks, a nonlinearity that "
        "is smooth at 0 sees nearly a point."
    ),
    "sign_diversity": (
        "Part of the samples with the rarer sign of the pre-activation, layer by layer. Near 0 all samples lie on one "
        "side of the kink of a ReLU."
    ),
    "gsc_matrix": (
        "GSC between several layers of each network, a panel a network. Red is growth from the layer below the cell to "
        "the layer beside it, blue is shrinkage."
    ),
    "linear_fit_error": (
        "What the best line leaves over of each layer's nonlinearity, on a logarithmic axis. A line that falls toward "
        "the right becomes nearly linear."
    ),
}


def figures(collected: Collected) -> dict[str, Figure]:
    """The generic ones, and the linear fit error."""
    frame = collected.frame
    keys = labels.network_keys(frame)
    made = sweep_figures.draw(frame, keys, report_growth.growth_table(frame, keys), sweep_figures.describe(collected))
    made["linear_fit_error"], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    plots.statistic(frame, "linear_fit_error", log10=True, hue=keys[0], style=keys[1], ax=ax)
    ax.set_title(f"{sweep_figures.describe(collected)}\n{sweep_figures.spread(frame)}", fontsize=10)
    return made


def claims(collected: Collected) -> list[Claim]:
    """Verdicts of growth, of layers that become linear, and what NLC sees of the whole."""
    frame = collected.frame
    growth = _growth(frame)
    return [
        *(_explodes(growth[model], model) for model in EXPLODING),
        *(_neither(growth[model], model) for model in STABLE),
        *(_linearity(frame, model, nearly=True) for model in STABLE),
        *(_linearity(frame, model, nearly=False) for model in EXPLODING),
        _as_a_whole(frame, growth),
        _unseen(frame, growth),
    ]


def answer(collected: Collected) -> str:
    """Who explodes, whose layers are nearly linear, what NLC says against it; and the table of all."""
    frame = collected.frame
    growth = _growth(frame)
    verdicts = {model: _verdict(row) for model, row in growth.items()}
    linear = {model: _nearly(_kept(frame, model)) for model in growth}
    growing = {"explodes": "Exploding:", "vanishes": "vanishing:", "neither": "neither:", "undecided": "undecided:"}
    bending = {True: "nearly linear in", False: "nonlinear in", None: "undecided in"}
    both = [_name(model) for model in growth if verdicts[model] == "explodes" and linear[model]]
    whole = _as_a_whole(frame, growth)
    agree = {
        True: "NLC, of the networks as a whole, agrees",
        False: "But by NLC, of the network as a whole, what does not explode can be farther from linear than what does",
        None: "NLC, of the networks as a whole, leaves it open",
    }
    rates = _grouped(growing, verdicts, {model: f" ({row['rate']:.3f} a layer)" for model, row in growth.items()})
    return (
        f"{rates}. The last layer is {_grouped(bending, linear, {})}. "
        f"{'Both at once: ' + ', '.join(both) if both else 'No network is shown to do both'}. "
        f"{agree[whole.holds]}: {whole.because}.\n\n{_table(frame, growth)}"
    )


def _grouped(words: Mapping[Any, str], found: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """The networks by what was found of them, in the order of ``words``."""
    names = {key: [_name(m) + notes.get(m, "") for m, own in found.items() if own == key] for key in words}
    return "; ".join(f"{words[key]} {', '.join(own)}" for key, own in names.items() if own)


def _growth(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of GSC, by model."""
    table = report_growth.growth_table(frame, ["model"]).set_index("model")
    return {str(model): table.loc[model].to_dict() for model in table.index}


def _verdict(row: dict[str, Any]) -> str:
    """Stricter than that of a single profile: a wide interval around 1 is undecided."""
    if row["verdict"] in ("exploding", "vanishing"):
        return {"exploding": "explodes", "vanishing": "vanishes"}[row["verdict"]]
    return "neither" if _inside(row) else "undecided"


def _inside(row: dict[str, Any]) -> bool:
    return bool(row["rate_low"] >= VANISHING_RATE and row["rate_high"] <= EXPLODING_RATE)


def _explodes(row: dict[str, Any], model: str) -> Claim:
    found = _verdict(row)
    return Claim(f"{_name(model)} explodes", None if found == "undecided" else found == "explodes", _because(row))


def _neither(row: dict[str, Any], model: str) -> Claim:
    beyond = row["rate_low"] > EXPLODING_RATE or row["rate_high"] < VANISHING_RATE
    holds = True if _inside(row) else False if beyond else None
    return Claim(f"{_name(model)} neither explodes nor vanishes", holds, _because(row))


def _because(row: dict[str, Any]) -> str:
    return f"rate {_rate(row)} a layer, mean field {row['theory']:.3f}"


def _rate(row: dict[str, Any]) -> str:
    return f"{row['rate']:.3f} ({row['rate_low']:.3f} to {row['rate_high']:.3f})"


def _linearity(frame: pd.DataFrame, model: str, *, nearly: bool) -> Claim:
    kept, last = _kept(frame, model), geometric_mean(_errors(frame, model).iloc[:, -1])
    found = _nearly(kept)
    return Claim(
        f"The last layer of {_name(model)} {'is nearly linear over its data' if nearly else 'stays nonlinear'}",
        None if found is None else found is nearly,
        f"linear fit error of the last layer {last:.2g}, {kept:.2g} of the first's",
    )


def _nearly(kept: Mean) -> bool | None:
    return True if kept.high < KEPT else False if kept.low > KEPT else None


def _as_a_whole(frame: pd.DataFrame, growth: dict[str, dict[str, Any]]) -> Claim:
    """Is NLC of each network that does not explode below that of each that does?"""
    found = {model: _nlc(frame, model) for model in growth}
    exploding = [model for model, row in growth.items() if _verdict(row) == "explodes"]
    says = "As a whole, too, every network that does not explode is nearer to linear than every one that does"
    if len(exploding) in (0, len(growth)):
        return Claim(says, None, f"{len(exploding)} of {len(growth)} networks explode")
    most = max((model for model in growth if model not in exploding), key=lambda model: found[model].value)
    least = min(exploding, key=lambda model: found[model].value)
    below, above = found[most].high < found[least].low, found[most].low > found[least].high
    return Claim(
        says,
        True if below else False if above else None,
        f"largest NLC without an explosion {found[most]:.3g} of {_name(most)}, smallest with one {found[least]:.3g} of "
        f"{_name(least)}",
    )


def _unseen(frame: pd.DataFrame, growth: dict[str, dict[str, Any]]) -> Claim:
    row, signs, nlc = growth["relu"], _last(frame, "relu", "sign_diversity"), _nlc(frame, "relu")
    quiet = row["rate_low"] <= 1 <= row["rate_high"]
    seen = signs.high < COLLAPSED and nlc.low > NONLINEAR
    unseen = signs.low > COLLAPSED or nlc.high < NONLINEAR
    return Claim(
        "The rate of GSC does not show that ReLU collapses its data; sign diversity and NLC do",
        False if unseen or not quiet else True if seen else None,
        f"relu: rate {_rate(row)} a layer, sign diversity of the last layer {signs:.2g}, NLC {nlc:.3g}",
    )


def _table(frame: pd.DataFrame, growth: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| network | GSC rate a layer | mean field | verdict | pre-activation std | sign diversity | linear fit error "
        "| NLC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, row in growth.items():
        error = geometric_mean(_errors(frame, model).iloc[:, -1])
        lines.append(
            f"| {_name(model)} | {_rate(row)} | {row['theory']:.3f} | {_verdict(row)} | "
            f"{_last(frame, model, 'preactivation_std'):.3f} | {_last(frame, model, 'sign_diversity'):.3f} | "
            f"{error:.2g} | {_nlc(frame, model):.3g} |"
        )
    return "\n".join(
        [*lines, "", "Standard deviation, sign diversity and linear fit error are those of the last layer."]
    )


def _last(frame: pd.DataFrame, model: str, quantity: str) -> Mean:
    """Of the last layer, over seeds."""
    rows = frame[(frame["quantity"] == quantity) & (frame["model"] == model)]
    return mean(rows.loc[rows["index"] == rows["index"].max(), "value"])


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


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
    captions=CAPTIONS,
)
