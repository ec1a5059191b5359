"""Which plain networks explode at initialization, and which become nearly linear."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean, verdict
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, measured, table, told
from experiments.reports import grids, sweep_figures
from experiments.reports import growth as report_growth
from gradscope import plots
from gradscope.coefficients.growth import MARGIN

# Networks that explode, and networks that do not, according to the literature.
EXPLODING = ("relu_batch", "tanh_layer", "tanh_batch", "selu")
STABLE = ("relu", "relu_layer", "tanh")
# A layer is nearly linear if its linear fit error, divided by the error of the first layer, is below KEPT.
KEPT = 0.1
# Data have collapsed if their sign diversity is below COLLAPSED.  A network is nonlinear if its NLC is above NONLINEAR.
COLLAPSED, NONLINEAR = 0.1, 2.0

Row = dict[Hashable, Any]


def figures(collected: Collected) -> dict[str, Figure]:
    """The figures that every sweep has, and a figure of the linear fit error."""
    frame, title = collected.frame, sweep_figures.describe(collected)
    keys = labels.network_keys(frame)
    made = sweep_figures.draw(frame, keys, report_growth.growth_table(frame, keys), title)
    made["linear_fit_error"], ax = plt.subplots(figsize=(6.8, 4.2), layout="constrained")
    plots.statistic(frame, "linear_fit_error", log10=True, hue=keys[0], style=keys[1], ax=ax)
    ax.set_title(f"{title}\n{grids.spread(frame)}", fontsize=10)
    return made


def claims(collected: Collected) -> list[Claim]:
    """Growth and linearity of every network, and whether NLC agrees."""
    frame = collected.frame
    growth, made = _growth(frame), []
    for model in (*EXPLODING, *STABLE):
        row, word = growth[model], _word(growth[model])
        says, holds = "explodes", None if word == "undecided" else word == "explodes"
        if model in STABLE:
            says, holds = "neither explodes nor vanishes", _neither(row)
        because = (
            f"growth rate of GSC per layer: {_rate(row)}; {_limits(model)}; rate in mean field: {row['theory']:.3f}"
        )
        made.append(Claim(f"{_name(model)} {says}", holds, because))
    for model in (*STABLE, *EXPLODING):
        kept, last = _kept(frame, model), geometric_mean(_errors(frame, model).iloc[:, -1])
        says, holds, limit = "stays nonlinear", kept.above(KEPT), f"nonlinear: ratio above {KEPT:g}"
        if model in STABLE:
            says, holds = "is nearly linear over the data", kept.below(KEPT)
            limit = f"nearly linear: ratio below {KEPT:g}"
        because = f"linear fit error of the last layer: {last}; ratio to the error of the first layer: {kept}; {limit}"
        made.append(Claim(f"The last layer of {_name(model)} {says}", holds, because))
    return [*made, _as_a_whole(frame, growth), _unseen(frame, growth)]


def answer(collected: Collected) -> str:
    """Which networks explode, which have a nearly linear last layer, and whether NLC agrees."""
    frame = collected.frame
    growth = _growth(frame)
    said: dict[str, list[str]] = {}
    for model, row in growth.items():
        said.setdefault(_word(row), []).append(f"{_name(model)} ({row['rate']:.3f})")
    phrases = {
        "explodes": "Gradients explode in {}",
        "vanishes": "they vanish in {}",
        "neither": "they neither explode nor vanish in {}",
        "undecided": "undecided: {}",
    }
    rates = "; ".join(words.format(listed(said[word])) for word, words in phrases.items() if word in said)
    rates = rates.replace("(", "(growth factor of GSC per layer: ", 1)
    linear = told(
        {_name(model): _kept(frame, model).below(KEPT) for model in growth},
        "becomes nearly linear in {};", "it stays nonlinear in {};", "undecided: {};",
    )  # fmt: skip
    whole = _as_a_whole(frame, growth)
    agree = {
        True: "Every exploding network is farther from linear than every other network",
        False: "A network that is not shown to explode can still be farther from linear than one that explodes",
        None: "It is undecided whether exploding networks are farther from linear than the others",
    }
    return f"{rates}. The last layer {linear.rstrip(';')}. {agree[whole.holds]}: {whole.because}."


def details(collected: Collected) -> str:
    """Tables for all networks: growth and NLC, and statistics of the last layer."""
    frame = collected.frame
    growth, whole, last = _growth(frame), [], []
    for model, row in growth.items():
        whole.append([_name(model), _rate(row), f"{row['theory']:.3f}", _word(row), _nlc(frame, model)])
        statistics = [_last(frame, model, name) for name in ("preactivation_std", "sign_diversity")]
        error = geometric_mean(_errors(frame, model).iloc[:, -1])
        last.append([_name(model), *statistics, error])
    both = [_name(model) for model in growth if _word(growth[model]) == "explodes" and _kept(frame, model).below(KEPT)]
    return "\n\n".join([
        table(["network", "GSC rate per layer", "mean field", "verdict", "NLC"], whole),
        "Statistics of the last layer:",
        table(["network", "pre-activation std", "sign diversity", "linear fit error"], last),
        f"Networks that explode and have a nearly linear last layer: {listed(both)}.",
    ])  # fmt: skip


def _growth(frame: pd.DataFrame) -> dict[str, Row]:
    """The measured growth of GSC of each model."""
    return {str(row["model"]): row for row in report_growth.growth_table(frame, ["model"]).to_dict("records")}


def _word(row: Row) -> str:
    words = {"exploding": "explodes", "vanishing": "vanishes", "stable": "neither"}
    return words.get(row["verdict"], "undecided")


def _neither(row: Row) -> bool | None:
    return verdict(row["verdict"] == "stable", row["verdict"] in ("exploding", "vanishing"))


def _limits(model: str) -> str:
    """The rates for which the claim about a network holds, in words."""
    low, high = 1 - MARGIN, 1 + MARGIN
    return f"neither: rate from {low:g} to {high:g}" if model in STABLE else f"explodes: rate above {high:g}"


def _rate(row: Row) -> str:
    return measured(row["rate"], row["rate_low"], row["rate_high"])


def _as_a_whole(frame: pd.DataFrame, growth: dict[str, Row]) -> Claim:
    """Whether NLC of every network that is not shown to explode is below NLC of every network that explodes."""
    found = {model: _nlc(frame, model) for model in growth}
    exploding = [model for model, row in growth.items() if _word(row) == "explodes"]
    says = "By NLC, every network that is not shown to explode is nearer to linear than every network that explodes"
    if len(exploding) in (0, len(growth)):
        return Claim(says, None, f"{len(exploding)} of {len(growth)} networks explode")
    most = max(set(growth) - set(exploding), key=lambda model: found[model].value)
    least = min(exploding, key=lambda model: found[model].value)
    holds = verdict(found[most].high < found[least].low, found[most].low > found[least].high)
    because = "the largest nonlinearity coefficient (NLC; 1 for an affine map) of networks not shown to explode is "
    because += f"{found[most]}, for {_name(most)}; the smallest NLC of exploding networks is {found[least]}, for "
    because += _name(least)
    return Claim(says, holds, because)


def _unseen(frame: pd.DataFrame, growth: dict[str, Row]) -> Claim:
    row, signs, nlc = growth["relu"], _last(frame, "relu", "sign_diversity"), _nlc(frame, "relu")
    quiet = row["rate_low"] <= 1 <= row["rate_high"]
    seen = quiet and signs.high < COLLAPSED and nlc.low > NONLINEAR
    says = (
        "relu: the data collapse (sign diversity) and the whole network is nonlinear (NLC), although the interval of "
        "the growth rate of GSC contains 1"
    )
    because = (
        f"growth rate of GSC per layer: {_rate(row)}; required: an interval that contains 1; sign diversity of the "
        f"last layer: {signs}; required: below {COLLAPSED:g}; NLC: {nlc}; required: above {NONLINEAR:g}"
    )
    return Claim(says, verdict(seen, not quiet or signs.low > COLLAPSED or nlc.high < NONLINEAR), because)


def _rows(frame: pd.DataFrame, model: str, quantity: str) -> pd.DataFrame:
    return frame[(frame["quantity"] == quantity) & (frame["model"] == model)]


def _last(frame: pd.DataFrame, model: str, quantity: str) -> Mean:
    """The mean of a statistic of the last layer over seeds."""
    rows = _rows(frame, model, quantity)
    return mean(rows.loc[rows["index"] == rows["index"].max(), "value"])


def _errors(frame: pd.DataFrame, model: str) -> pd.DataFrame:
    """Linear fit errors of one network, as a table of shape (seeds, layers)."""
    rows = _rows(frame, model, "linear_fit_error")
    return rows.pivot_table(index="seed", columns="index", values="value", observed=True)


def _kept(frame: pd.DataFrame, model: str) -> Mean:
    """Linear fit error of the last layer divided by the error of the first layer."""
    errors = _errors(frame, model)
    return geometric_mean(errors.iloc[:, -1] / errors.iloc[:, 0])


def _nlc(frame: pd.DataFrame, model: str) -> Mean:
    return geometric_mean(_rows(frame, model, "nlc")["value"])


def _name(model: str) -> str:
    return model.replace("_", "+")


STUDY = Study(
    question="Which plain networks explode at initialization, and which become nearly linear?",
    use="""
Before you train a deep plain network, measure the growth rate of GSC. Also measure sign diversity and linear fit error
of the last layers, because these layers can be nearly linear even if GSC neither explodes nor vanishes. The study
[remedies](remedies.md) shows how to reduce the growth.
""",
    method=f"""
Plain networks are fully connected and have no skip connections. They have depth {{model.depth}} and width
{{model.width}}. The name relu+batch, for example, means ReLU with batch normalization. We use {{data.batch_size}}
samples of Gaussian noise and {{num_seeds}} initializations, in {{dtype}}.

- **GSC** from every layer to the output is computed exactly. Its growth rate per layer is fitted over the half of the
  layers nearer the output. A network **explodes** if the 95 % interval of the rate lies above {1 + MARGIN:g}. A
  network **vanishes** if the interval lies below {1 - MARGIN:g}. It does **neither** (the figure says "stable") if the
  interval lies between {1 - MARGIN:g} and {1 + MARGIN:g}. Otherwise the verdict is **undecided**.
- **Pre-activation standard deviation** of a neuron is taken over samples. **Sign diversity** of a neuron is the
  fraction of samples whose pre-activation has the rarer sign. We average variances and sign diversity over neurons.
  If standard deviation or sign diversity is small, the layer may be nearly linear over the data. If sign diversity is
  below {COLLAPSED:g}, we say that the data **collapse**.
- **Linear fit error**: for each neuron, a line is fitted to the output of the nonlinearity as a function of its input.
  The error is the fraction of the variance that the lines do not explain. The last layer is **nearly linear** if its
  error is less than {KEPT:g} times the error of the first layer.
- **Nonlinearity coefficient** (NLC, arXiv:1806.00179) describes the whole network. NLC is 1 for an affine map, and
  larger for functions that are farther from linear. Many nearly linear layers can form a function that is far from
  linear, so NLC and linear fit error may disagree.

The claims state what we expect from the results of G. Philipp, D. Song and J. Carbonell (arXiv:1712.05577).
""",
    how_sure="""
Intervals are 95 % Student's t intervals over initializations, not corrected for multiple comparisons. Means of linear
fit errors and of NLC are geometric means. The rates are for this depth and width and for Gaussian noise. The study
[depth_width](depth_width.md) varies depth and width. The sweep `architectures_cifar10`
([results](../../results/README.md)) uses images. No network is trained.
""",
    claims=claims,
    answer=answer,
    details=details,
    figures=figures,
    captions={
        "gsc": "GSC of every layer against its distance from the output. Each network is labeled with its growth rate "
        "and verdict. Thin lines with markers show the predictions of mean field, in the color of the network. Bands "
        "are one standard deviation over seeds.",
        "preactivation_std": "Standard deviation of the pre-activations over samples, layer by layer. If this "
        "deviation is small, a smooth nonlinearity is nearly a straight line over the data. The curve of relu+batch is "
        "hidden under the curve of tanh+batch. Bands are one standard deviation over seeds.",
        "sign_diversity": "Fraction of the samples whose pre-activation has the rarer sign, layer by layer. If this "
        "fraction is near 0, almost all samples lie on one side of the kink of a ReLU. Bands are one standard "
        "deviation over seeds.",
        "gsc_matrix": "GSC between pairs of layers, one panel per network. The column is the earlier layer, the row is "
        "the later layer. Red: GSC above 1 (growth). Blue: GSC below 1 (shrinkage).",
        "linear_fit_error": "Linear fit error, layer by layer: fraction of the variance of activations that a line "
        "does not explain. If a curve falls to the right, later layers are nearer to linear. Bands are one standard "
        "deviation over seeds.",
    },
)
