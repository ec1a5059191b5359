"""How much of a network's depth does training use?  Plain and residual, shallow and deep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from experiments.archive.tables import Collected
from experiments.evidence.means import all_of, mean
from experiments.evidence.study import Claim, Study
from experiments.studies.effective_depth import figures as effective_depth_figures
from experiments.studies.effective_depth.measurement import MOMENTUM, PROBES, TOLERANCES, TRIED
from experiments.studies.effective_depth.measurement import measure as measure
from experiments.studies.effective_depth.numbers import (
    NETWORK,
    SUFFERS,
    Key,
    by_seed,
    final,
    layers,
    name,
    replaceable,
    trained,
)

# "As if independent": within so many layers.
NEAR = 1.0
# A network has learned that tells so many of the test digits right.
LEARNED = 0.5
# Of shares below this the frame keeps nothing, nor of the ends of intervals before the end of training.
SMALLEST = -15.0

QUESTION = "How many layers of a trained network act on each other's changes?"
METHOD = f"""
**Residual trick.** Every layer is what it was before training plus what training added, f_l = i_l + r_l. At what enters
it now its Jacobian is I_l + R_l, and the Jacobian of the network, a product over layers, is a sum of one term for each
set of layers that give R_l instead of I_l. C^k is the sum of the terms with k such layers: what k trained layers make
on top of each other. All C^k are found exactly, by the recurrence of elementary symmetric polynomials, applied to
matrices:

- C^k_l = I_l C^k_(l-1) + R_l C^(k-1)_(l-1)

The **effective depth** is the largest k whose share, the length of C^k over the sum of the lengths of all, reaches
{TOLERANCES[0]:g}. The residual trick and the term are those of G. Philipp, D. Song and J. Carbonell (arXiv:1712.05577),
who bound C^k by norms of the layers; the share of exact contributions is this project's definition
(`gradscope.effective_depth`). Beside it stands what the shares would be if the layers had directions independent of
each other, from the lengths of I_l and R_l alone.

**Taylor replacement.** The last n layers are replaced by their first-order expansion around the parameters before
training (`gradscope.taylor_losses`), in which one layer's change never meets another's. The loss suffers where it is
more than {SUFFERS:g} above that of the whole network, on {TRIED} training digits.

**Networks.** Multilayer perceptrons of width 50 with and without skip connections (f + V phi(norm(W f)), one block
counts as a layer) learn the digits of scikit-learn, 64 features, by SGD with a momentum of {MOMENTUM:g}; of several
learning rates each run keeps the one that ends with the lowest training loss. Effective depths are measured in float64
on a batch of digits, exactly, or from {PROBES} random vectors where batch normalization couples the samples.
"""
HOW_SURE = """
Intervals are over seeds (weights, order and measured digits), 95 %, Student's t; those of one kind of claim hold
together (Bonferroni). Contributions are exact for the measured digits, or come from random vectors. What counts as a
layer is a matter of definition: a residual block is one. The tolerance is a convention; the table has a second one.
Effective depth says how much of the change was composed, not whether it was of use: a network that fails to learn moves
its layers too, and a wider, a longer or a better training would give other numbers.
"""
CAPTIONS = {
    "effective_depth": "Effective depth while networks of depth 50 learn, and at the end for both depths; mean over "
    "seeds, bars and bands: 95 % interval.",
    "contributions": "Shares of what k trained layers make together, at the end of training, depth 50; mean of the "
    "logarithms over seeds. Dotted: if the layers had independent directions.",
    "taylor": "Loss when the last layers are replaced by one first-order expansion, depth 50; median over seeds, band "
    "from the lowest to the highest.",
}


def condensed(collected: Collected) -> Collected:
    """Without shares that are far below every tolerance, and without intervals of effective depth along the way."""
    frame = collected.frame
    shares = frame["quantity"].isin(["contribution", "independent_contribution"])
    along = frame["quantity"].isin(["effective_depth_low", "effective_depth_high"]) & (
        frame["step"] < frame["step"].max()
    )
    return replace(collected, frame=frame[~(shares & (frame["log10_value"] < SMALLEST)) & ~along])


def claims(collected: Collected) -> list[Claim]:
    """Of each network how much of its depth counts, what skips and depth change, and the check by replacement."""
    frame = collected.frame
    keys = trained(frame)
    shallow, deep = (min(key[3] for key in keys), max(key[3] for key in keys))
    most = [key for key in keys if key[3] == deep]
    families: list[tuple[Callable[[pd.DataFrame, Key, int], Claim], list[Key]]] = [
        (_half, most),
        (_all, [key for key in keys if key[3] == shallow]),
        (_grows, most),
        (_deeper, [key for key in most if (*key[:3], shallow) in keys]),
        (_skips, [key for key in most if key[2] == "none" and _residual(key) in keys]),
        (_stands, most),
    ]
    made = [claim(frame, key, len(family)) for claim, family in families for key in family]
    return [*made, _independent(frame, keys), _together(frame, keys), _certain(frame, keys)]


def answer(collected: Collected) -> str:
    """What the networks that learn have in common, a table of all networks, and what fails."""
    frame = collected.frame
    keys = trained(frame)
    deep = [key for key in keys if key[3] == max(key[3] for key in keys)]
    accuracy = {key: mean(final(frame, key, "test_accuracy")).value for key in deep}
    learned, others = ([key for key in deep if (accuracy[key] > LEARNED) is which] for which in (True, False))
    text = f"The networks of depth {deep[0][3]} that learn to tell digits {_used(frame, learned)}."
    if others:
        named = ", ".join(f"{name(key)} ({100 * accuracy[key]:.0f} % right)" for key in others)
        text += f" Those that hardly learn, {named}, {_used(frame, others)}: a large effective depth is no success."
    for skips, words in ((False, "without"), (True, "with")):
        stands = [mean(replaceable(frame, key)).value for key in deep if (key[2] != "none") is skips]
        if stands:
            text += (
                f" Of the deep networks {words} skip connections {min(stands):.0f} to {max(stands):.0f} of the last "
            )
            text += "layers can be replaced by a first-order expansion."
    failed = [key for key in frame[NETWORK].drop_duplicates().itertuples(index=False, name=None) if key not in keys]
    if failed:
        text += " Training fails with every learning rate for " + "; ".join(f"{name(k)}, depth {k[3]}" for k in failed)
        text += "."
    header = ["network", "layers", "test accuracy, %", "effective depth"]
    header += [f"at {TOLERANCES[1]:g}", "if independent", "replaceable"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for key in keys:
        cells = [f"{name(key)}, depth {key[3]}", str(layers(frame, key))]
        cells.append(f"{100 * mean(final(frame, key, 'test_accuracy')).value:.1f}")
        numbers = [final(frame, key), final(frame, key, index=1), final(frame, key, "independent_depth")]
        cells += [f"{mean(values):.1f}" for values in (*numbers, replaceable(frame, key))]
        lines.append("| " + " | ".join(cells) + " |")
    return text + "\n\n" + "\n".join(lines)


def figures(collected: Collected) -> dict[str, Figure]:
    """Effective depth over training, shares of all contributions, and losses with layers replaced."""
    return {
        "effective_depth": effective_depth_figures.over_training(collected.frame),
        "contributions": effective_depth_figures.contributions(collected.frame),
        "taylor": effective_depth_figures.replaced(collected.frame),
    }


def _used(frame: pd.DataFrame, keys: Sequence[Key]) -> str:
    depths = [mean(final(frame, key)).value for key in keys]
    most = max(layers(frame, key) for key in keys)
    return f"have effective depths of {min(depths):.1f} to {max(depths):.1f}, of {most} layers at most"


def _residual(key: Key) -> Key:
    return (*key[:2], "identity", key[3])


def _half(frame: pd.DataFrame, key: Key, comparisons: int) -> Claim:
    num, found = layers(frame, key), mean(final(frame, key), comparisons)
    return Claim(
        f"Of {name(key)}, depth {key[3]}, fewer than half of the layers count",
        found.below(num / 2),
        f"effective depth {found:.1f} of {num} layers",
    )


def _all(frame: pd.DataFrame, key: Key, comparisons: int) -> Claim:
    """Decided run by run, so without an interval, however many ``comparisons`` there are."""
    num, values = layers(frame, key), final(frame, key)
    return Claim(
        f"Of {name(key)}, depth {key[3]}, all layers count in every run",
        bool((values == num).all()),
        f"effective depths {values.min():.0f} to {values.max():.0f} of {num} layers",
    )


def _grows(frame: pd.DataFrame, key: Key, comparisons: int) -> Claim:
    table = by_seed(frame, key, "effective_depth", tolerance=TOLERANCES[0])
    first, last = table.index[0], table.index[-1]
    change = mean(table.loc[last] - table.loc[first], comparisons)
    return Claim(
        f"The effective depth of {name(key)}, depth {key[3]}, grows while it learns",
        change.above(0.0),
        f"from {mean(table.loc[first]):.1f} after step {first:.0f} by {change:.1f} until step {last:.0f}",
    )


def _deeper(frame: pd.DataFrame, key: Key, comparisons: int) -> Claim:
    shallow = min(other[3] for other in trained(frame))
    difference = mean(final(frame, key) - final(frame, (*key[:3], shallow)), comparisons)
    return Claim(
        f"{name(key)} of depth {key[3]} has a larger effective depth than that of depth {shallow}",
        difference.above(0.0),
        f"larger by {difference:.1f}",
    )


def _skips(frame: pd.DataFrame, key: Key, comparisons: int) -> Claim:
    difference = mean(final(frame, _residual(key)) - final(frame, key), comparisons)
    return Claim(
        f"Skip connections enlarge the effective depth of {name(key)}, depth {key[3]}",
        difference.above(0.0),
        f"it changes by {difference:.1f}",
    )


def _stands(frame: pd.DataFrame, key: Key, comparisons: int) -> Claim:
    found, num = mean(replaceable(frame, key), comparisons), layers(frame, key)
    return Claim(
        f"The last half of {name(key)}, depth {key[3]}, can be replaced by a first-order expansion",
        found.above(num / 2),
        f"{found:.1f} of {num} layers before the loss rises by {SUFFERS:g}",
    )


def _independent(frame: pd.DataFrame, keys: list[Key]) -> Claim:
    differences = {
        key: mean(final(frame, key, "independent_depth") - final(frame, key), comparisons=len(keys)) for key in keys
    }
    farthest = max(differences, key=lambda key: abs(differences[key].value))
    return Claim(
        f"Effective depth is, within {NEAR:g} layer, as if layers had independent directions",
        all_of(*(one.within(0.0, NEAR) for one in differences.values())),
        f"farthest is {name(farthest)}, depth {farthest[3]}, by {differences[farthest]:.1f}",
    )


def _together(frame: pd.DataFrame, keys: list[Key]) -> Claim:
    """Over networks, by a permutation test of the rank correlation."""
    used = [mean(final(frame, key)).value / layers(frame, key) for key in keys]
    stands = [mean(replaceable(frame, key)).value / layers(frame, key) for key in keys]
    ranks, others = (stats.zscore(stats.rankdata(values)) for values in (used, stands))
    found = stats.permutation_test(
        (ranks,), lambda order, axis: (order * others).mean(axis=axis), permutation_type="pairings", vectorized=True,
        n_resamples=9999, rng=np.random.default_rng(0),
    )  # fmt: skip
    correlated = bool(found.pvalue < 0.05)
    return Claim(
        "The larger the part of its depth that a network uses, the smaller the part that can be replaced",
        bool(found.statistic < 0) if correlated else None,
        f"rank correlation over {len(keys)} networks {found.statistic:.2f}, p = {found.pvalue:.2g}",
    )


def _certain(frame: pd.DataFrame, keys: list[Key]) -> Claim:
    ends = [(final(frame, key, "effective_depth_low"), final(frame, key, "effective_depth_high")) for key in keys]
    widest = max(int((high - low).max()) for low, high in ends)
    runs = sum(len(low) for low, _ in ends)
    same = sum(int((low == high).sum()) for low, high in ends)
    return Claim(
        "Within the error of its contributions the effective depth of a run is certain to a layer",
        widest <= 1,
        f"certain in {same} of {runs} runs, elsewhere within {widest}",
    )


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
    captions=CAPTIONS,
    condensed=condensed,
)
