"""Vanishing gradients: a chain by hand, chains of many units, and networks with and without normalization."""

from __future__ import annotations

import copy
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import gradscope as gs
import gradscope.meanfield as mf
from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence.means import geometric_mean
from experiments.evidence.study import Claim, Study
from experiments.reports import growth as report_growth
from experiments.studies.vanishing import chains
from experiments.studies.vanishing import figures as vanishing_figures
from experiments.studies.vanishing.numbers import NETWORKS, SCALES, SIGMOID, SLOPE, chosen, in_theory, layers, rate
from gradscope.measures import GradientNorm, PreactivationStd
from gradscope.models import MLP

# Of a double: what "digit by digit" can mean.
ROUNDING = 1e-14
# Within so much of its length a gradient counts as kept, over the whole depth.
KEPT = 10.0

QUESTION = "Do gradients vanish because the slope of a sigmoid is at most 1/4?"
METHOD = f"""
**By hand.** A chain of two hidden sigmoid units and a sigmoid output, a1 = s(w1 x), a2 = s(w2 a1), y = s(w3 a2), with
the loss E = (t - y)^2 / 2. With s' = s (1 - s) the chain rule gives, from the output back,

- d3 = -(t - y) y (1 - y), dE/dw3 = d3 a2
- d2 = d3 w3 a2 (1 - a2), dE/dw2 = d2 a1
- d1 = d2 w2 a1 (1 - a1), dE/dw1 = d1 x

which is evaluated in plain floating-point arithmetic and compared with what autograd finds, sign and all, and with the
lengths of gradients that `gs.measure` gives.

**Chains.** L units h <- s(w h + b) in a row: the derivative of the last with respect to the first is a product of L
factors w s', so at most (w / 4)^L. Measured over {chains.UNITS} units for {" and for ".join(chains.LONG)}; the second
holds the unit where its slope is largest.

**Networks.** Depth {{model.depth}} and width {{model.width}} with a linear head for {{model.out_features}} classes,
{{dtype}}, on {{data.batch_size}} samples of Gaussian noise with random labels, {{num_seeds}} initializations: the
length of the gradient of the mean cross-entropy with respect to the weights of every layer (`gs.measure`). Its
**factor a layer** is that between the last layer and the second, from the output toward the input; a gradient is kept
where this factor, taken for every layer, changes it by less than {KEPT:g} times. Also the growth rate of GSC, from
every layer to the logits, and the standard deviation over samples of the pre-activations that the last layer applies
its nonlinearity to. Weights have variance 2 / n for ReLU and 1 / n for the others.

**What the slope can do in a network.** For wide layers with weights of variance v / n the factor a layer is
sqrt(v E[s'^2]), so at most sqrt(v) / 4: with the usual v = 1 no more than 1/4, whatever the data. Larger weights raise
this bound; so the hidden weights of the sigmoid network are also multiplied by {", ".join(map(str, SCALES))}. A
normalized layer has a further factor, one over the deviation that it divides by, and no such bound.
"""
HOW_SURE = f"""
Intervals are over initializations, 95 %, Student's t of the logarithm. Those of the factors a layer hold together for
all {len(NETWORKS)} networks (Bonferroni), those of scaled weights for all {len(SCALES)} scales. The hand-derived chain
and the bound of a chain are theorems, checked up to rounding. The networks are at initialization, of one depth and one
width, without biases.
"""
CAPTIONS = {
    "gradients": (
        "Length of the gradient of the weights of every layer, for four activations, one panel a normalization. A line "
        "that falls toward the left vanishes on its way to the input."
    ),
    "chains": (
        "Derivative through a row of sigmoid units, and its bound, for small and for large weights. With small weights "
        "it falls below the bound; with large ones, held where the slope is largest, the same sigmoid lets it grow."
    ),
    "weights": (
        "Factor a layer of the gradient of a sigmoid network against the variance of its weights. Points are measured, "
        "with intervals; the dashed line is mean field, the dotted one the bound by the slope."
    ),
}


def measure(model: nn.Module, x: Tensor, *, generator: torch.Generator) -> pd.DataFrame:
    """Gradients of every layer, GSC and deviations of a network with a head, told apart by ``weight_scale``.

    Of a sigmoid network without normalization also the gradients with larger weights, and the chains.
    """
    with torch.no_grad():
        num_classes = model(x).shape[1]
    y = torch.randint(num_classes, (len(x),), generator=generator)
    parts = [
        gs.measure(model, (x, y), loss_fn=_loss, measures=[GradientNorm(), PreactivationStd()]),
        gs.gsc(model, x).to_frame(),
    ]
    if not _is_plain_sigmoid(model):
        return pd.concat(parts, ignore_index=True).assign(weight_scale=1)
    parts += [chains.compared(), *(chains.long_chain(name) for name in chains.LONG)]
    parts = [part.assign(weight_scale=1) for part in parts]
    for scale in SCALES:
        larger = gs.measure(scaled(model, scale), (x, y), loss_fn=_loss, measures=[GradientNorm()])
        parts.append(larger.assign(weight_scale=scale))
    return pd.concat(parts, ignore_index=True)


def scaled(model: nn.Module, scale: float) -> nn.Module:
    """A copy whose weights are multiplied by ``scale``, in every layer but the head."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.startswith("layers."):
                weight.mul_(scale)
    return other


def _is_plain_sigmoid(model: nn.Module) -> bool:
    return isinstance(model, MLP) and all(
        isinstance(layer.activation, nn.Sigmoid) and layer.norm is None for layer in model.layers
    )


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output, labels, reduction="none")


def figures(collected: Collected) -> dict[str, Figure]:
    """Gradients of every layer, chains beside their bounds, and what larger weights do."""
    frame = collected.frame
    return {
        "gradients": vanishing_figures.gradients(frame),
        "chains": vanishing_figures.long_chains(frame),
        "weights": vanishing_figures.larger_weights(frame),
    }


def claims(collected: Collected) -> list[Claim]:
    """The hand-derived chain, the bound, which networks vanish, and what larger weights do."""
    frame = collected.frame
    difference = float(chosen(frame, "relative_difference")["value"].max())
    plain, held = chains.LONG
    steady = _growth(frame)[SIGMOID]
    return [
        Claim(
            "Automatic differentiation gives what the chain rule gives by hand, digit by digit",
            difference < ROUNDING,
            f"largest relative difference of the three derivatives {difference:.1e}",
            identity=True,
        ),
        Claim(
            "A chain of L sigmoids with weight 1 shrinks a gradient by 4^-L at least",
            chains.excess(frame, plain) <= 1e-12,
            f"after {chains.UNITS} units 10^{chains.last(frame, 'log10_chain', plain):.2f}, the bound is "
            f"10^{chains.last(frame, 'log10_chain_bound', plain):.2f}",
            identity=True,
        ),
        Claim(
            "Whatever the weights, a chain of sigmoids shrinks a gradient",
            chains.last(frame, "log10_chain", held) < 0,
            f"with {held}, which holds the units in the middle, it is multiplied by "
            f"10^{chains.last(frame, 'log10_chain', held):.2f} over {chains.UNITS} units",
        ),
        _quarter(frame),
        Claim(
            "Measured by GSC a sigmoid network vanishes too, so it is no matter of scale",
            steady["verdict"] == "vanishing",
            f"rate {steady['rate']:.4f} ({steady['rate_low']:.4f} to {steady['rate_high']:.4f}), {steady['verdict']}",
        ),
        *(_keeps(frame, activation, norm) for activation, norm in NETWORKS),
        _unbound(frame),
        _larger(frame, "the gradient of a sigmoid network grows toward the input", SCALES[-1], 1.0),
    ]


def answer(collected: Collected) -> str:
    """The factor a layer of every network, what larger weights do, and the chain digit by digit."""
    frame = collected.frame
    lead = {
        True: "Yes for a sigmoid network with the usual weights, of variance 1 / n",
        False: "Not in a sigmoid network with the usual weights, of variance 1 / n",
        None: "The data cannot tell for a sigmoid network with the usual weights, of variance 1 / n",
    }[_quarter(frame).holds]
    larger = ", ".join(f"{rate(frame, *SIGMOID, scale).value:.3f} with {scale**2} / n" for scale in SCALES)
    alone = not (_unbound(frame).holds or _keeps(frame, "sigmoid", "batch").holds)
    inputs = f"x = {chains.INPUT}, t = {chains.TARGET}, (w1, w2, w3) = {chains.WEIGHTS}"
    return (
        f"{lead}: on its way from the output to the input its gradient changes by a factor of "
        f"{rate(frame, *SIGMOID):.4f} a layer; mean field has {in_theory(1):.4f} and allows {SLOPE:g} at most. "
        f"{'' if alone else 'But the slope does not decide alone. '}With larger weights the factor of the same network "
        f"is {larger}; with a normalization its slopes are sigmoid's, too. {_kept_names(frame)}\n\n"
        f"{_network_table(frame)}\n\n"
        "The factor is that of the gradient of the weights, with intervals that hold together; rate, mean field and "
        f"verdict are of GSC.\n\nThe chain by hand, for {inputs} (formulas under Method):\n\n{chains.table(frame)}"
    )


def _growth(frame: pd.DataFrame) -> dict[tuple[str, str], Any]:
    """Of GSC, by activation and normalization."""
    table = report_growth.growth_table(frame, ["activation", "norm"])
    return {(row["activation"], row["norm"]): row for row in table.to_dict("records")}


def _quarter(frame: pd.DataFrame) -> Claim:
    factor = rate(frame, *SIGMOID)
    return Claim(
        "In a sigmoid network a gradient shrinks to a quarter a layer, or less",
        True if factor.high < SLOPE else False if factor.low > SLOPE else None,
        f"factor a layer {factor:.4f}; mean field has {in_theory(1):.4f}, and cannot have more than {SLOPE:g}",
    )


def _keeps(frame: pd.DataFrame, activation: str, norm: str) -> Claim:
    depth, factor, network = layers(frame), rate(frame, activation, norm), labels.network_name([activation, norm])
    most = KEPT ** (1 / depth)
    inside, outside = factor.low > 1 / most and factor.high < most, factor.high < 1 / most or factor.low > most
    return Claim(
        f"The gradients of {network} keep their length within a factor of {KEPT:g} over {depth} layers",
        True if inside else False if outside else None,
        f"factor a layer {factor:.3f}, over {depth} layers {factor.value**depth:.2g}",
    )


def _unbound(frame: pd.DataFrame) -> Claim:
    return _larger(frame, "the gradient of a sigmoid network shrinks less than to a quarter a layer", SCALES[0], SLOPE)


def _larger(frame: pd.DataFrame, says: str, scale: int, least: float) -> Claim:
    """With these weights the factor of a sigmoid network is more than ``least``."""
    factor = rate(frame, *SIGMOID, scale)
    return Claim(
        f"With weights of variance {scale**2} / n {says}",
        True if factor.low > least else False if factor.high < least else None,
        f"factor a layer {factor:.3f}, mean field {in_theory(scale):.3f}, the slope allows {scale * SLOPE:g}",
    )


def _kept_names(frame: pd.DataFrame) -> str:
    """Which networks keep the length of their gradients, which shrink or grow it, and which nobody can tell."""
    names: dict[str, list[str]] = {"kept in": [], "shrunk more in": [], "grown more in": [], "kept or not in": []}
    for activation, norm in NETWORKS:
        holds = _keeps(frame, activation, norm).holds
        shrunk = "shrunk more in" if rate(frame, activation, norm).value < 1 else "grown more in"
        words = {True: "kept in", False: shrunk, None: "kept or not in"}[holds]
        names[words].append(labels.network_name([activation, norm]))
    parts = [f"{words} {', '.join(own)}" for words, own in names.items() if own]
    return f"Within a factor of {KEPT:g} over {layers(frame)} layers its length is {'; '.join(parts)}."


def _network_table(frame: pd.DataFrame) -> str:
    depth, growth = layers(frame), _growth(frame)
    batch_size = int(frame["num_samples"].max())
    deviations = chosen(frame, "preactivation_std")
    deviations = deviations[deviations["index"] == deviations["index"].max()]
    lines = [
        f"| network | factor a layer | over {depth} layers | GSC rate a layer | mean field | verdict | pre-activation "
        "std, last layer |",
        "|---|---|---|---|---|---|---|",
    ]
    for activation, norm in NETWORKS:
        row, factor = growth[activation, norm], rate(frame, activation, norm)
        expected = mf.gsc_rate(activation, norm, batch_size=batch_size if norm == "batch" else None)
        own = deviations[(deviations["activation"] == activation) & (deviations["norm"] == norm)]["value"]
        lines.append(
            f"| {labels.network_name([activation, norm])} | {factor:.3f} | {factor.value**depth:.2g} | "
            f"{row['rate']:.3f} ({row['rate_low']:.3f} to {row['rate_high']:.3f}) | {expected:.3f} | "
            f"{row['verdict']} | {_deviation(own)} |"
        )
    return "\n".join(lines)


def _deviation(values: pd.Series) -> str:
    """Over seeds; samples that are nearer to each other than rounding have none."""
    return "below rounding" if (values < ROUNDING).all() else f"{geometric_mean(values):.3g}"


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
    captions=CAPTIONS,
)
