"""How much of its depth a trained network uses, for plain and residual, shallow and deep networks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.archive.tables import Collected
from experiments.evidence.means import all_of, mean
from experiments.evidence.rank_correlation import rank_correlation
from experiments.evidence.study import Claim, Study
from experiments.evidence.words import listed, table
from experiments.studies.effective_depth import figures
from experiments.studies.effective_depth.measurement import MOMENTUM, PROBES, TOLERANCES, TRIED, measure
from experiments.studies.effective_depth.numbers import SUFFERS, Key, Runs, name

__all__ = ["STUDY", "measure"]

# Effective depths that differ by at most this number of layers count as equal.
NEAR = 1.0
# What an effective depth is, for the answer.
MEANS = " (largest number of layers whose changes by training, multiplied, contribute noticeably to the Jacobian)"
# A network has learned if it classifies this fraction of the test digits correctly.
LEARNED = 0.5
# Contributions with a log10 share below this value are not stored.
SMALLEST = -15.0


def condensed(collected: Collected) -> Collected:
    """The runs without shares below `SMALLEST` and without intervals of effective depths before the last step."""
    frame = collected.frame
    shares = frame["quantity"].isin(["contribution", "independent_contribution"])
    ends = frame["quantity"].isin(["effective_depth_low", "effective_depth_high"])
    dropped = shares & (frame["log10_value"] < SMALLEST) | ends & (frame["step"] < frame["step"].max())
    return replace(collected, frame=frame[~dropped])


def claims(collected: Collected) -> list[Claim]:
    """The effective depth of each network, how it depends on depth and skips, and the replacement of layers."""
    runs, made = Runs(collected.frame), []
    alike = {key: other for key in runs.deep for other in runs.shallow if other[:3] == key[:3]}
    skips = {key: (*key[:2], "identity", key[3]) for key in runs.deep if key[2] == "none"}
    skips = {key: other for key, other in skips.items() if other in runs.deep}
    num = len(runs.deep)
    for key in runs.deep:
        found, layers = mean(runs.final(key), num), runs.layers(key)
        says = f"{name(key)}: the effective depth is below half the number of layers"
        made.append(
            Claim(
                says,
                found.below(layers / 2),
                f"effective depth: {found} of {_counted(runs, key)}; half of the layers: {layers / 2:g}",
            )
        )
    for key in runs.shallow:  # every run must agree, so there is no interval
        values, layers = runs.final(key), runs.layers(key)
        reached = listed(sorted(values.astype(int).unique()), "or")
        because = f"effective depth of single runs: {reached} of {_counted(runs, key)}"
        says = f"{name(key)}: in every run, the effective depth equals the number of layers ({layers} {_with(key)})"
        made.append(Claim(says, bool((values == layers).all()), because))
    for key in runs.deep:
        depths = runs.by_seed(key, tolerance=TOLERANCES[0])
        first, last = depths.index[0], depths.index[-1]
        change = mean(depths.loc[last] - depths.loc[first], num)
        because = (
            f"effective depth after step {first:.0f}: {mean(depths.loc[first])} layers; change until step {last:.0f}: "
            f"{change:+} layers"
        )
        made.append(Claim(f"{name(key)}: the effective depth grows during training", change.above(0), because))
    for key, other in alike.items():
        found = mean(runs.final(key) - runs.final(other), len(alike))
        says = f"{name(key)}: the effective depth is larger than at depth {other[3]}"
        made.append(Claim(says, found.above(0), f"effective depth minus effective depth at depth {other[3]}: {found}"))
    for key, other in skips.items():
        found = mean(runs.final(other) - runs.final(key), len(skips))
        says = f"{name(key)}: skip connections increase the effective depth"
        made.append(
            Claim(says, found.above(0), f"effective depth with skip connections minus effective depth without: {found}")
        )
    for key in runs.deep:
        found, layers = mean(runs.replaceable(key), num), runs.layers(key)
        says = f"{name(key)}: a first-order expansion can replace more than half of the layers"
        because = (
            f"layers replaced while the loss rises by at most {SUFFERS:g}: {found} of {_counted(runs, key)}; "
            f"half of the layers: {layers / 2:g}"
        )
        made.append(Claim(says, found.above(layers / 2), because))
    return [*made, _independent(runs), _together(runs), _certain(runs)]


def _with(key: Key) -> str:
    """Which layers the number of layers includes besides hidden layers or blocks."""
    return "including the head" if key[2] == "none" else "including the stem and the head"


def _counted(runs: Runs, key: Key) -> str:
    return f"{runs.layers(key)} layers ({_with(key)})"


def _independent(runs: Runs) -> Claim:
    keys = runs.trained
    found = {key: mean(runs.final(key, "independent_depth") - runs.final(key), len(keys)) for key in keys}
    farthest = max(found, key=lambda key: abs(found[key].value))
    near = {key: one.within(0, NEAR) for key, one in found.items()}
    words = {key: f'{one} in the network "{name(key)}"' for key, one in found.items()}
    outside = ", ".join(words[key] for key, holds in near.items() if holds is False)
    shown = f"the difference farthest from 0 is {words[farthest]}"
    says = (
        "If Jacobians of layers before training and their changes by training had independent directions, the "
        f"effective depth of every network would change by at most {NEAR:g} layer"
    )
    return Claim(
        says,
        all_of(*near.values()),
        f"effective depth with independent directions minus measured effective depth: {outside or shown}",
    )


def _together(runs: Runs) -> Claim:
    """Whether networks that use a larger fraction of their layers have a smaller fraction that can be replaced."""
    used, replaced = (
        [mean(values(key)).value / runs.layers(key) for key in runs.trained]
        for values in (runs.final, runs.replaceable)
    )
    found = rank_correlation(used, replaced)
    says = (
        "A network with a larger ratio of effective depth to number of layers has a smaller fraction of replaceable "
        "layers"
    )
    return Claim(
        says,
        found.value < 0 if found.p < 0.05 else None,
        f"rank correlation of this ratio and this fraction over {found.num} networks: {found.value:.2f}; p = "
        f"{found.p:.2g}; required for a decision: p below 0.05",
    )


def _certain(runs: Runs) -> Claim:
    widths = np.concatenate([
        runs.final(key, "effective_depth_high") - runs.final(key, "effective_depth_low") for key in runs.trained
    ])  # fmt: skip
    says = "Estimation errors change the effective depth of a run by at most one layer"
    return Claim(
        says,
        bool(widths.max() <= 1),
        f"both ends of the 95 % interval of a run's effective depth are equal in {(widths == 0).sum()} of "
        f"{len(widths)} runs; largest difference of the ends in the other runs: {widths.max():.0f} "
        f"{'layer' if widths.max() == 1 else 'layers'}",
    )


def answer(collected: Collected) -> str:
    """Effective depths of deep networks that learn and of deep networks that do not, and replaceable layers."""
    runs = Runs(collected.frame)
    accuracy = {key: mean(runs.final(key, "test_accuracy")).value for key in runs.deep}
    learned, others = ([key for key in runs.deep if (accuracy[key] > LEARNED) is which] for which in (True, False))
    text = [f"Deep networks that learn to classify digits {_used(runs, learned, MEANS)}."] if learned else []
    if others:
        names = "; ".join(f"{name(key)}: {100 * accuracy[key]:.0f} % of test digits correct" for key in others)
        text.append(f"Deep networks that hardly learn ({names}) {_used(runs, others)}.")
    stands = []
    for skips in ("without", "with"):
        keys = [key for key in runs.deep if (key[2] == "none") is (skips == "without")]
        if found := [mean(runs.replaceable(key)).value for key in keys]:
            stands.append(
                f"the last {min(found):.0f} to {max(found):.0f} layers of deep networks {skips} skip connections"
            )
    lost = f"If the loss may rise by {SUFFERS:g}, a first-order expansion in the weights can replace (depending on the"
    return " ".join([*text, f"{lost} network) {listed(stands)}."])


def _used(runs: Runs, keys: list[Key], words: str = "") -> str:
    depths = [mean(runs.final(key)).value for key in keys]
    most = max(map(runs.layers, keys))
    return (
        f"have up to {most} layers, and their effective depth{words} is {min(depths):.1f} to {max(depths):.1f} layers"
    )


def details(collected: Collected) -> str:
    """A table of all networks, and the names of networks that are left out because their training diverges."""
    runs = Runs(collected.frame)
    header = ["network", "layers", "test accuracy, %"]
    header += ["effective depth", f"effective depth for share {TOLERANCES[1]:g}", "effective depth if independent"]
    rows = []
    for key in runs.trained:
        found = [runs.final(key), runs.final(key, index=1), runs.final(key, "independent_depth"), runs.replaceable(key)]
        accuracy = f"{100 * mean(runs.final(key, 'test_accuracy')).value:.1f}"
        rows.append([name(key), runs.layers(key), accuracy, *(str(mean(values)) for values in found)])
    columns = (
        "Numbers of layers include the head and, in residual networks, the stem. "
        f'"Effective depth for share {TOLERANCES[1]:g}": the largest k whose share is at least {TOLERANCES[1]:g}, not '
        f'{TOLERANCES[0]:g}. "Effective depth if independent": computed as if the Jacobians of layers before training '
        "and their changes by training had independent directions. "
        '"Replaceable layers": largest number of last layers that a first-order expansion can replace while the loss '
        f"rises by at most {SUFFERS:g}."
    )
    parts = [columns, table([*header, "replaceable layers"], rows)]
    if runs.failed:
        parts.append(
            f"Left out ({len(runs.failed)} of {len(runs.failed) + len(runs.trained)} networks), because at "
            f"least one seed diverges with every learning rate: "
            + listed(f'"{name(key)}"' for key in runs.failed)
            + "."
        )
    return "\n\n".join(parts)


STUDY = Study(
    question="How much of its depth does a trained network use?",
    use="""
Do not assume that training uses all layers. Also check the accuracy of a deep network: a network that hardly learns can
have a large effective depth. In deep networks with skip connections, a first-order expansion in the weights can replace
about half of the layers or more. This expansion only adds the effects of training each of these layers. Because it can
replace them, the effects nearly add up in the trained network.
""",
    method=f"""
**Residual trick.** J_l is the Jacobian of layer l of the trained network: the derivative of the layer's output with
respect to its input. I_l is the Jacobian of the same layer at the same input, but with the parameters before training.
R_l = J_l - I_l is the change by training. The Jacobian of the network is the product of I_l + R_l over all layers.
Expand this product. C^k is the sum of all its terms with exactly k factors R_l: the **joint contribution** of k trained
layers. A recurrence gives C^k: if C^k_l is this sum for the first l layers, then
`C^k_l = I_l C^k_(l-1) + R_l C^(k-1)_(l-1)`.

**Effective depth.** The share of C^k is its Frobenius norm divided by the sum of the norms of C^0, C^1, and so on. The
**effective depth** is the largest k whose share is at least {TOLERANCES[0]:g} (`gradscope.effective_depth`). The
residual trick and the name "effective depth" are from G. Philipp, D. Song and J. Carbonell (arXiv:1712.05577). They
bound the norm of C^k by norms of I_l and R_l. The definition by shares is ours.

**Independent directions.** For comparison, we compute the effective depth under an assumption: the Jacobians I_l
before training and their changes R_l have independent random directions. Then the squared norm of C^k is the sum of the
squared norms of its terms, and only the norms of I_l and R_l matter.

**Taylor replacement.** The output is expanded to first order in the parameters of the last n layers, around their
values before training (`gradscope.taylor_losses`). This expansion **replaces** the n layers. It leaves out products of
the changes of different layers. We report the largest n for which the loss on {TRIED} training digits rises by at most
{SUFFERS:g}.

**Networks.** Multilayer perceptrons of width {{model.width}} learn the digits of scikit-learn (64 features) by SGD with
momentum {MOMENTUM:g}. The networks are plain or have skip connections ("residual"). With skip connections, a block with
input f and weight matrices V and W computes f + V phi(norm(W f)). Here phi is the activation, and norm is the
normalization.

**Number of layers.** A network of depth d has d hidden layers or, with skip connections, d blocks. Each block counts as
one layer. The linear head counts as a layer, too. So does the linear stem of residual networks, the map before the
first block. Therefore the number of layers is d plus one in a plain network, and d plus two in a residual network.

**Training.** For each seed, a network is trained with several learning rates. The run with the lowest final training
loss is measured. Effective depths are computed in float64 on a batch of digits. Without batch normalization, they are
exact for these digits. With batch normalization, every output depends on all digits of the batch. An exact effective
depth would need a backward pass for every output of every digit. Instead, we estimate it from the backward passes of
{PROBES} random vectors.

**Estimation errors.** Each effective depth of a run has a 95 % interval. With batch normalization, it covers the error
due to the random vectors. In other networks, it covers the error due to the choice of the digits.
""",
    how_sure=f"""
Intervals are 95 % Student's t intervals over seeds. Each seed draws other weights, another order of the digits and
other measured digits. The intervals of all claims of one kind, for example about growth during training, are
simultaneous (Bonferroni). The limit of shares for the effective depth, {TOLERANCES[0]:g}, is a convention. The table
also has effective depths for a larger limit. Wider networks or longer training may give other numbers.
""",
    claims=claims,
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "effective_depth": "Effective depth of networks during and after training. Left: the deepest networks during "
        "training. Right: all networks at the end of training; filled markers show the deepest networks, hollow "
        "markers the others, and strokes the number of layers. Bars and bands are 95 % intervals over seeds; "
        "there is no bar where all seeds agree. On the right, points of different depths are shifted up or down.",
        "contributions": "Share of C^k, the joint contribution of k trained layers, against k, for the deepest "
        "networks at the end of training. Lines are means of logarithms over seeds, with bands of one standard "
        "deviation. Dotted lines assume that the layers' Jacobians before training and their changes by training have "
        "independent directions. A line ends where at least one seed has a share below 1e-15: such shares are not "
        "stored. The gray line is the limit of the share that defines the effective depth.",
        "taylor": "Rise of the loss of the deepest networks when a first-order expansion replaces their last layers, "
        "against the number of these layers. Lines are medians over seeds. Bands go from the lowest to the highest "
        f"seed. The gray line is a rise by {SUFFERS:g}. The vertical axis is linear below the gray line, and "
        "logarithmic above it.",
    },
    condensed=condensed,
)
