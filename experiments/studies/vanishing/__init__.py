"""Vanishing gradients: a chain by hand, long chains, and networks with and without normalization."""

from __future__ import annotations

import pandas as pd

from experiments.archive import labels
from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import measured, table
from experiments.studies.vanishing import chains, figures, numbers
from experiments.studies.vanishing.measurement import measure
from experiments.studies.vanishing.numbers import NETWORKS, SCALES, SIGMOID, SLOPE
from gradscope.coefficients.growth import MARGIN

__all__ = ["STUDY", "measure"]

# Limits of rounding errors: relative, for one float64 number; absolute, for log10 over all units of a chain.
ROUNDING, CHAIN_ROUNDING = 1e-14, 1e-12
# The norm of a gradient counts as kept if it changes by less than this factor over the whole depth.
KEPT = 10.0


def claims(collected: Collected) -> list[Claim]:
    """The claims about chains and their bound, about networks that vanish, and about larger weights."""
    frame = collected.frame
    difference = float(numbers.chosen(frame, "relative_difference")["value"].max())
    plain, held = chains.LONG
    steady = numbers.gsc_growth(frame)[SIGMOID]
    return [
        Claim(
            "Automatic differentiation agrees with the chain rule by hand, up to rounding",
            difference < ROUNDING,
            f"largest relative difference, over the three derivatives: {difference:.1e}",
            identity=True,
        ),
        Claim(
            "A chain of L sigmoids with weight 1 multiplies a gradient by 4^-L or less",
            chains.excess(frame, plain) <= CHAIN_ROUNDING,
            f"factor over {chains.UNITS} units: 10^{chains.last(frame, 'log10_chain', plain):.2f}; upper bound: "
            f"10^{chains.last(frame, 'log10_chain_bound', plain):.2f}",
            identity=True,
        ),
        Claim(
            "A chain of sigmoids shrinks a gradient for any weights",
            chains.last(frame, "log10_chain", held) < 0,
            f"with {held} (units near their largest slope), the gradient is multiplied by "
            f"10^{chains.last(frame, 'log10_chain', held):.2f} over {chains.UNITS} units",
        ),
        _quarter(frame),
        Claim(
            "GSC, which does not depend on the scale of the outputs of a layer, also vanishes in a sigmoid network",
            steady["verdict"] == "vanishing",
            f"growth rate of GSC per layer: {measured(steady['rate'], steady['rate_low'], steady['rate_high'])}, "
            f"verdict: {steady['verdict']}; required: rate below {1 - MARGIN:g}",
        ),
        *(_keeps(frame, activation, norm) for activation, norm in NETWORKS),
        _larger(frame, SCALES[0]),
        _larger(frame, SCALES[-1]),
    ]


def answer(collected: Collected) -> str:
    """The factor per layer of the sigmoid network, and whether weights and normalization matter."""
    frame = collected.frame
    lead = {True: "Yes, for", False: "No, not for", None: "The data cannot tell for"}[_quarter(frame).holds]
    alone = not (_larger(frame, SCALES[0]).holds or _keeps(frame, "sigmoid", "batch").holds)
    return (
        f"{lead} a sigmoid network with weight variance 1 / n, where n is the number of inputs of a layer. Per layer "
        f"toward the input, the gradient norm is multiplied by {numbers.rate(frame, *SIGMOID)}; mean-field theory "
        f"predicts {numbers.in_theory(1):.4f}, and the slope allows at most {SLOPE:g}."
        f"{'' if alone else ' But the slope does not decide alone: weights and normalization also matter.'}"
    )


def details(collected: Collected) -> str:
    """Factors with larger weights, a table of all networks, and the chain by hand."""
    frame = collected.frame
    larger = ", ".join(f"{numbers.rate(frame, *SIGMOID, scale).value:.3f} for {scale**2} / n" for scale in SCALES)
    inputs = f"x = {chains.INPUT}, t = {chains.TARGET}, (w1, w2, w3) = {chains.WEIGHTS}"
    return (
        f"Factor per layer of the gradient norm in the sigmoid network, by its weight variance: {larger}.\n\n"
        f"Rate, mean field and verdict are those of GSC:\n\n{_network_table(frame)}\n\n"
        f"The chain by hand, for {inputs}:\n\n{chains.by_hand_table(frame)}"
    )


def _quarter(frame: pd.DataFrame) -> Claim:
    factor = numbers.rate(frame, *SIGMOID)
    says = "In a sigmoid network, the gradient norm shrinks toward the input to a quarter or less per layer, "
    says += "on average over layers"
    because = f"factor per layer: {factor}; mean field: {numbers.in_theory(1):.4f}; upper bound: {SLOPE:g}"
    return Claim(says, factor.below(SLOPE), because)


def _keeps(frame: pd.DataFrame, activation: str, norm: str) -> Claim:
    depth, factor = numbers.layers(frame), numbers.rate(frame, activation, norm)
    most = KEPT ** (1 / depth)
    return Claim(
        f"In the network {labels.network_name([activation, norm])}, gradient norms change by less than a factor of "
        f"{KEPT:g} over {depth} layers",
        means.all_of(factor.above(1 / most), factor.below(most)),
        f"factor per layer: {factor}; claimed: factor per layer from {1 / most:.3f} to {most:.3f}; factor over {depth} "
        f"layers: {factor.value**depth:.2g}",
    )


def _larger(frame: pd.DataFrame, scale: int) -> Claim:
    """Whether the gradient norm shrinks by less than a factor of 4 (smallest scale), or grows (largest scale)."""
    keeps = (f"shrinks by less than a factor of {1 / SLOPE:g} per layer", SLOPE)
    says, least = {SCALES[0]: keeps, SCALES[-1]: ("grows toward the input", 1.0)}[scale]
    factor = numbers.rate(frame, *SIGMOID, scale)
    return Claim(
        f"With weight variance {scale**2} / n, the gradient norm of a sigmoid network {says}",
        factor.above(least),
        f"factor per layer: {factor}; mean field: {numbers.in_theory(scale):.3f}; upper bound (from the slope): "
        f"{scale * SLOPE:g}",
    )


def _network_table(frame: pd.DataFrame) -> str:
    growth, predicted = numbers.gsc_growth(frame), numbers.gsc_rates(frame)
    head = ["network", "GSC rate per layer", "mean field", "verdict", "pre-activation std, last layer"]
    rows = []
    for network in NETWORKS:
        row = growth[network]
        rate = measured(row["rate"], row["rate_low"], row["rate_high"])
        last = numbers.last_deviations(frame, *network)  # below rounding if all samples have nearly the same values
        deviation = "below rounding" if (last < ROUNDING).all() else str(means.geometric_mean(last))
        theory = f"{predicted[network]:.3f}"
        rows.append([labels.network_name(network), rate, theory, row["verdict"], deviation])
    return table(head, rows)


STUDY = Study(
    question="Do gradients vanish because the slope of a sigmoid is at most 1/4?",
    answer=answer,
    use="""
Do not conclude from the slope of an activation that gradients vanish. Measure the factor by which the
gradient norm changes per layer, or GSC, with the weights and the normalization of your network.
""",
    method=f"""
**By hand.** A chain has two hidden sigmoid units and a sigmoid output, a1 = s(w1 x), a2 = s(w2 a1), y = s(w3 a2), and
the loss is E = (t - y)^2 / 2. The sigmoid s has s' = s (1 - s), so the chain rule gives, from output to input:

- d3 = -(t - y) y (1 - y), dE/dw3 = d3 a2
- d2 = d3 w3 a2 (1 - a2), dE/dw2 = d2 a1
- d1 = d2 w2 a1 (1 - a1), dE/dw1 = d1 x

Autograd must give dE/dw1, dE/dw2 and dE/dw3, and `gs.measure` their absolute values.

**Chains.** A chain has L sigmoid units h_i = s(w h_(i-1) + b). Its derivative dh_L / dh_0 is a product of L factors
w s'. The slope s' is at most 1/4, so the derivative is at most (w / 4)^L. We measure it over {chains.UNITS} units, for
{" and for ".join(chains.LONG)}. The second choice keeps the units near their largest slope.

**Networks.** The networks are fully connected, with depth {{model.depth}}, width {{model.width}} and a linear head for
{{model.out_features}} classes, in {{dtype}}. Inputs are {{data.batch_size}} samples of Gaussian noise with random
labels; there are {{num_seeds}} initializations. Weights have variance 2 / n for ReLU and 1 / n otherwise, where n is
the number of inputs of the layer. We measure:

- the gradient norm: the norm of the gradient of the mean cross-entropy with respect to the weights of a layer
  (`gs.measure`);
- the growth rate of GSC from every layer to the logits;
- the standard deviation over samples of the pre-activations of the last layer.

From each layer to the layer before it, the gradient norm is multiplied by a factor. The **factor per layer** is the
geometric mean of these factors, from the last layer back to the second.

**Bound by the slope.** For wide sigmoid layers with weight variance v / n, the factor per layer is sqrt(v E[s'^2]),
where E[s'^2] is the mean squared slope. The slope is at most 1/4, so the factor is at most sqrt(v) / 4 for any data.
Larger weights raise this bound. So we also multiply the hidden weights of the sigmoid network by
{", ".join(map(str, SCALES))}. Then v is {", ".join(str(scale**2) for scale in SCALES)}. With normalization, the bound
does not hold: normalization divides by a standard deviation, which can be small.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over initializations, computed for logarithms. Intervals of factors per layer
are simultaneous (Bonferroni) over the {len(NETWORKS)} networks. For the sigmoid network with multiplied weights, they
are simultaneous over its {len(SCALES)} weight variances. All networks are at initialization, have no biases, and have
the same depth and width.
""",
    claims=claims,
    figures=figures.draw,
    captions={
        "gradients": "Norm of the gradient of the weights of every layer, one panel per normalization. Lines are means "
        "of logarithms over seeds, bands one standard deviation.",
        "chains": "Derivative of the last unit of a chain of sigmoids with respect to the input of the chain, against "
        "the number of units, and the upper bound of this derivative. The colors stand for small and large weights.",
        "weights": "Factor per layer of the gradient norm in a sigmoid network, against its weight variance. Bars are "
        "95 % intervals.",
    },
    details=details,
)
