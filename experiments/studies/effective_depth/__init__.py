"""How much of a network's depth training uses: plain and residual, shallow and deep networks."""

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

# Effective depths within this number of layers count as equal.
NEAR = 1.0
# A network has learned if it classifies this fraction of the test digits correctly.
LEARNED = 0.5
# Shares below this power of ten are not kept in the frame.
SMALLEST = -15.0


def condensed(collected: Collected) -> Collected:
    """Drops shares far below every tolerance, and intervals of effective depth before the end of training."""
    frame = collected.frame
    shares = frame["quantity"].isin(["contribution", "independent_contribution"])
    ends = frame["quantity"].isin(["effective_depth_low", "effective_depth_high"])
    dropped = shares & (frame["log10_value"] < SMALLEST) | ends & (frame["step"] < frame["step"].max())
    return replace(collected, frame=frame[~dropped])


def claims(collected: Collected) -> list[Claim]:
    """How many layers count in each network, what depth and skips change, and the check by replacement."""
    runs, made = Runs(collected.frame), []
    alike = {key: other for key in runs.deep for other in runs.shallow if other[:3] == key[:3]}
    skips = {key: (*key[:2], "identity", key[3]) for key in runs.deep if key[2] == "none"}
    skips = {key: other for key, other in skips.items() if other in runs.deep}
    num = len(runs.deep)
    for key in runs.deep:
        found, layers = mean(runs.final(key), num), runs.layers(key)
        says = f"Of {name(key)}, fewer than half of the layers count"
        made.append(Claim(says, found.below(layers / 2), f"effective depth {found:.1f} of {layers} layers"))
    for key in runs.shallow:  # decided run by run, so without an interval
        values, layers = runs.final(key), runs.layers(key)
        because = f"effective depth {listed(sorted(values.astype(int).unique()), 'or')} of {layers} layers"
        made.append(Claim(f"Of {name(key)}, all layers count in every run", bool((values == layers).all()), because))
    for key in runs.deep:
        depths = runs.by_seed(key, tolerance=TOLERANCES[0])
        first, last = depths.index[0], depths.index[-1]
        change = mean(depths.loc[last] - depths.loc[first], num)
        because = f"from {mean(depths.loc[first]):.1f} after step {first:.0f} by {change:.1f} until step {last:.0f}"
        made.append(Claim(f"The effective depth of {name(key)}, grows while it learns", change.above(0), because))
    for key, other in alike.items():
        found = mean(runs.final(key) - runs.final(other), len(alike))
        says = f"{name(key)}, has a larger effective depth than with depth {other[3]}"
        made.append(Claim(says, found.above(0), f"larger by {found:.1f}"))
    for key, other in skips.items():
        found = mean(runs.final(other) - runs.final(key), len(skips))
        says = f"Skip connections enlarge the effective depth of {name(key)}"
        made.append(Claim(says, found.above(0), f"it changes by {found:.1f}"))
    for key in runs.deep:
        found, layers = mean(runs.replaceable(key), num), runs.layers(key)
        says = f"A first-order expansion can replace the last half of {name(key)}"
        because = f"{found:.1f} of {layers} layers before the loss rises by {SUFFERS:g}"
        made.append(Claim(says, found.above(layers / 2), because))
    return [*made, _independent(runs), _together(runs), _certain(runs)]


def _independent(runs: Runs) -> Claim:
    keys = runs.trained
    found = {key: mean(runs.final(key, "independent_depth") - runs.final(key), len(keys)) for key in keys}
    farthest = max(found, key=lambda key: abs(found[key].value))
    return Claim(
        f"Effective depth is, within {NEAR:g} layer, as if layers had independent directions",
        all_of(*(one.within(0, NEAR) for one in found.values())),
        f"the largest difference is {found[farthest]:.1f} ({name(farthest)})",
    )


def _together(runs: Runs) -> Claim:
    """Over networks, by a permutation test of the rank correlation."""
    used, replaced = (
        [mean(values(key)).value / runs.layers(key) for key in runs.trained]
        for values in (runs.final, runs.replaceable)
    )
    found = rank_correlation(used, replaced)
    return Claim(
        "The larger the fraction of its layers that a network uses, the smaller the fraction that can be replaced",
        found.value < 0 if found.p < 0.05 else None,
        f"rank correlation over {found.num} networks {found.value:.2f}, p = {found.p:.2g}",
    )


def _certain(runs: Runs) -> Claim:
    widths = np.concatenate([
        runs.final(key, "effective_depth_high") - runs.final(key, "effective_depth_low") for key in runs.trained
    ])  # fmt: skip
    return Claim(
        "The error of the contributions leaves the effective depth of a run uncertain by at most one layer",
        bool(widths.max() <= 1),
        f"certain in {(widths == 0).sum()} of {len(widths)} runs, elsewhere within {widths.max():.0f}",
    )


def answer(collected: Collected) -> str:
    """Effective depths of deep networks that learn and of those that do not, and replaceable layers."""
    runs = Runs(collected.frame)
    accuracy = {key: mean(runs.final(key, "test_accuracy")).value for key in runs.deep}
    learned, others = ([key for key in runs.deep if (accuracy[key] > LEARNED) is which] for which in (True, False))
    text = [f"Deep networks that learn the digits {_used(runs, learned)}."] if learned else []
    if others:
        names = listed(f"{name(key)} ({100 * accuracy[key]:.0f} % correct)" for key in others)
        text.append(f"Those that hardly learn, {names}, {_used(runs, others)}: a large effective depth is no success.")
    stands = []
    for skips in ("without", "with"):
        keys = [key for key in runs.deep if (key[2] == "none") is (skips == "without")]
        if found := [mean(runs.replaceable(key)).value for key in keys]:
            stands.append(f"the last {min(found):.0f} to {max(found):.0f} layers {skips} skip connections")
    return " ".join([*text, f"A first-order expansion can replace {listed(stands)}."])


def _used(runs: Runs, keys: list[Key]) -> str:
    depths = [mean(runs.final(key)).value for key in keys]
    return f"use {min(depths):.1f} to {max(depths):.1f} of at most {max(map(runs.layers, keys))} layers"


def details(collected: Collected) -> str:
    """All networks, and those whose training fails."""
    runs = Runs(collected.frame)
    header = ["network", "layers", "test accuracy, %", "effective depth", f"at {TOLERANCES[1]:g}"]
    rows = []
    for key in runs.trained:
        found = [runs.final(key), runs.final(key, index=1), runs.final(key, "independent_depth"), runs.replaceable(key)]
        accuracy = f"{100 * mean(runs.final(key, 'test_accuracy')).value:.1f}"
        rows.append([name(key), runs.layers(key), accuracy, *(f"{mean(values):.1f}" for values in found)])
    failed = f"Training fails with every learning rate for: {listed(map(name, runs.failed))}."
    return f"{table([*header, 'if independent', 'replaceable'], rows)}\n\n{failed}"


STUDY = Study(
    question="How many layers of a trained network act on each other's changes?",
    use="""
Do not read the number of layers as the depth that training used. Check a deep network by its accuracy first: a network
that hardly learns can have a large effective depth. With skip connections, most of the last layers of these deep
networks change the function almost independently of each other.
""",
    method=f"""
**Residual trick.** Every layer is the layer before training plus the change by training, f_l = i_l + r_l, with the
Jacobian I_l + R_l at its current input. The Jacobian of the network is a product over layers, hence a sum with one term
for each set of layers that contribute R_l instead of I_l. C^k is the sum of the terms with k such layers: the joint
contribution of k trained layers. All C^k are computed exactly by the recurrence of elementary symmetric polynomials:

- C^k_l = I_l C^k_(l-1) + R_l C^(k-1)_(l-1)

The share of C^k is its length over the sum of the lengths of all contributions. The **effective depth** is the largest
k whose share reaches {TOLERANCES[0]:g} (`gradscope.effective_depth`). Residual trick and term are those of G. Philipp,
D. Song and J. Carbonell (arXiv:1712.05577), who bound C^k by norms of the layers; the share is this project's. For
comparison, it is also computed for layers with independent directions, from the lengths of I_l and R_l alone.

**Taylor replacement.** A first-order expansion around the parameters before training replaces the last n layers
(`gradscope.taylor_losses`). In this expansion the change of one layer never meets that of another. A network suffers if
its loss rises by more than {SUFFERS:g}, on {TRIED} training digits.

**Networks.** Multilayer perceptrons of width {{model.width}} learn the digits of scikit-learn (64 features) by SGD with
momentum {MOMENTUM:g}. They are plain or have skip connections: f + V phi(norm(W f)), one layer per block. Each run
keeps the learning rate with the lowest final training loss. Effective depths are exact, in float64 on a batch of
digits, or estimated from {PROBES} random vectors if batch normalization couples the samples.
""",
    how_sure="""
Intervals are over seeds, which draw the weights, the order of the digits and the measured digits: 95 %, Student's t.
The intervals of one kind of claim hold together (Bonferroni). The tolerance is a convention; the table has a second
one. Wider networks or longer training would give other numbers.
""",
    claims=claims,
    answer=answer,
    details=details,
    figures=figures.draw,
    captions={
        "effective_depth": "Effective depth while the deepest networks learn, and of all networks at the end. Ticks on "
        "the right mark the number of layers. Bars and bands are 95 % intervals over seeds.",
        "contributions": "Shares of the contributions of k trained layers at the end of training, for the deepest "
        "networks. Lines are means of logarithms over seeds. Dotted lines assume layers with independent directions.",
        "taylor": "Loss of the deepest networks when a first-order expansion replaces their last layers. Lines are "
        "medians over seeds, bands go from the lowest to the highest seed.",
    },
    condensed=condensed,
)
