"""What stride, padding and pooling do to GSC: stacks of convolutions that share their weights."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import stacks
from experiments.collect import Collected
from experiments.study import Claim
from experiments.summaries import Mean, geometric_mean, mean
from gradscope import plots

QUESTION = "What do stride, padding and pooling do to the gradients of a convolutional network?"
METHOD = """
Stacks of three stages of two convolutions 3 x 3 with ReLU, 64 channels, He's weights, no biases, on Gaussian noise of
16 x 16 pixels, four samples, eight probes. The stacks of one seed have the same weights and see the same noise; they
differ in one thing:

- **circular**: on a torus, which has no border; the stack that the others are compared with. **valid**, **reflect** and
  **zeros**: without padding, with the picture mirrored, with zeros.
- **strided**: the first convolution of every stage has stride 2, on a torus.
- **max**, **average**: 2 x 2 pooling at the end of every stage, on a torus.

Compared is log10 GSC of the input to the output, seed by seed, so that what a draw of weights does to all stacks alike
drops out; the factor by which it differs is the geometric mean over seeds.

**Mean field** (many channels). Taps of a kernel are independent, so that with He's weights a convolution with its ReLU
keeps GSC, whatever its stride; padding with zeros leaves positions at the border with fewer taps, both forward and
backward. Average pooling of m taps has |J|_F^2 / n = 1 / m^2 and multiplies GSC by 1 / (1 + (m - 1) rho), with rho the
cosine of two taps: 1 / m where they are equal. Max pooling hands each gradient to one tap, which is positive more often
than a tap is; this gives 2 P(max h > 0) / (2 E[max(h, 0)^2]). White noise makes uncorrelated pre-activations, and each
layer makes them more alike. For the mean field of convolutions see J. Xiao et al., "Dynamical isometry and a mean field
theory of CNNs" (arXiv:1806.05393).
"""
HOW_SURE = """
Intervals are over initializations and noise, 95 %, Student's t of the logarithm. A total that changes by less than ten
percent counts as unchanged. Mean field, which is for infinitely many channels, is granted three percent a layer, a
margin that was chosen after trial runs, not before. All of it is for white noise: the pixels of pictures are correlated
from the start, and then average pooling lowers GSC more from the first stage on.
"""

SIDE = 16  # of the noise, which is no column of a frame
REFERENCE = "circular"
KEEPING = ("strided", "valid", "reflect", "zeros")
POOLING = ("max", "average")
WORDS = {
    "strided": "stride 2", "valid": "no padding", "reflect": "mirrored padding", "zeros": "zero padding",
    "max": "max pooling", "average": "average pooling", "circular": "torus",
}  # fmt: skip
UNCHANGED = 1.1
# Of mean field at this width, a layer.
TOLERANCE = 1.03


def figures(collected: Collected) -> dict[str, Figure]:
    """What each kind does to the total, and profiles by layer."""
    return {"total": _total(collected.frame), "layers": _layers(collected.frame)}


def claims(collected: Collected) -> list[Claim]:
    """What keeps GSC, what lowers it, and whether by as much as predicted."""
    frame = collected.frame
    found = {kind: factor(frame, kind) for kind in (*KEEPING, *POOLING)}
    totals, half = _factors(frame), _depth(frame) // 2
    apart, middle = geometric_mean(totals["average"] / totals["max"]), factor(frame, "zeros", half)
    return [
        *(
            _near(
                f"{WORDS[kind].capitalize()} changes GSC of a whole stack by less than ten percent",
                found[kind],
                1.0,
                UNCHANGED,
            )
            for kind in KEEPING
        ),
        Claim(
            "Zero padding lowers GSC of the middle of a stack",
            _lowers(middle),
            f"factor {middle:.3f}, mean field {_predicted(frame, 'zeros')[half]:.3f}",
        ),
        *(
            Claim(f"{WORDS[kind].capitalize()} lowers GSC", _lowers(found[kind]), f"factor {found[kind]:.3f}")
            for kind in POOLING
        ),
        Claim(
            "Average pooling lowers it more than max pooling",
            _lowers(apart),
            f"factor of average over max pooling {apart:.3f}",
        ),
        *(
            _near(
                f"{WORDS[kind].capitalize()} changes GSC by what mean field says",
                found[kind],
                float(_predicted(frame, kind)[0]),
                TOLERANCE ** _num_steps(frame, kind),
            )
            for kind in POOLING
        ),
    ]


def answer(collected: Collected) -> str:
    """What keeps, what lowers."""
    found = {kind: factor(collected.frame, kind) for kind in (*KEEPING, *POOLING)}
    keeps = max(abs(math.log(found[kind].value)) for kind in KEEPING)
    lowered = ", ".join(f"{WORDS[kind]} by a factor of {1 / found[kind].value:.1f}" for kind in POOLING)
    return (
        f"Stride and padding hardly matter: they change GSC over a whole stack by {100 * math.expm1(keeps):.1f} % at "
        f"most. Three times 2 x 2 pooling lowers it, {lowered}: an average keeps what the values of a window have in "
        "common, and of a random change that is little."
    )


def factor(frame: pd.DataFrame, kind: str, place: int = 0) -> Mean:
    """Between GSC from the layer at ``place`` (0: the input) and that of the stack on a torus, seed by seed."""
    return geometric_mean(_factors(frame, place)[kind])


def _factors(frame: pd.DataFrame, place: int = 0) -> pd.DataFrame:
    """Seeds x kinds."""
    rows = _rows(frame)
    layer = "input" if place == 0 else f"conv{place}"
    table = rows[rows["layer"] == layer].pivot_table(index="seed", columns="kind", values="log10_value", observed=True)
    return 10 ** table.sub(table[REFERENCE], axis=0)


def _rows(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["quantity"] == "gsc"]


def _depth(frame: pd.DataFrame) -> int:
    return int(frame["stages"].iloc[0]) * int(frame["convs"].iloc[0])


def _num_steps(frame: pd.DataFrame, kind: str) -> int:
    return len(_predicted(frame, kind)) - 1


def _predicted(frame: pd.DataFrame, kind: str) -> stacks.FloatArray:
    """Mean field of GSC of the input and every layer."""
    stages, convs = int(frame["stages"].iloc[0]), int(frame["convs"].iloc[0])
    expected = stacks.expected_log10_gsc(kind, stages=stages, convs=convs, side=SIDE)
    return np.asarray(10**expected)


def _lowers(found: Mean) -> bool | None:
    return True if found.high < 1 else False if found.low > 1 else None


def _near(says: str, found: Mean, expected: float, margin: float) -> Claim:
    """Whether a factor is the expected one within the factor ``margin``, whole interval and all."""
    inside = found.low > expected / margin and found.high < expected * margin
    outside = found.high < expected / margin or found.low > expected * margin
    return Claim(
        says,
        True if inside else False if outside else None,
        f"factor {found:.3f}, expected {expected:.3f}, accepted {expected / margin:.3f} to {expected * margin:.3f}",
    )


def _total(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 3.6), layout="constrained")
    kinds = (*KEEPING, *POOLING)
    colors = sns.color_palette("colorblind")
    for place, kind in enumerate(kinds):
        found = factor(frame, kind)
        error = [[found.value - found.low], [found.high - found.value]]
        label = "measured, 95 % interval" if place == 0 else None
        ax.errorbar(found.value, place, xerr=error, fmt="o", color=colors[0], capsize=3, label=label)
        label = "mean field" if place == 0 else None
        ax.plot(_predicted(frame, kind)[0], place, "x", color=colors[1], markersize=9, markeredgewidth=2, label=label)
    ax.axvspan(1 / UNCHANGED, UNCHANGED, color="0.9", zorder=0, label="ten percent")
    ax.set_yticks(range(len(kinds)), [WORDS[kind] for kind in kinds])
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="GSC (squared convention), input to output, relative to the torus")
    ax.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0.02, 0.30))
    seeds = frame["seed"].nunique()
    ax.set_title(f"Six convolutions of 64 channels, compared seed by seed; {seeds} seeds", fontsize=10)
    sns.despine(ax=ax)
    return figure


def _layers(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 4.0), layout="constrained", sharey=True)
    for ax, kinds in zip(axes, ((REFERENCE, *KEEPING), ("max",), ("average",)), strict=True):
        _profiles(ax, frame, kinds)
    axes[0].set_title("stride and padding", fontsize=10)
    axes[1].set_title("max pooling", fontsize=10)
    axes[2].set_title("average pooling", fontsize=10)
    axes[0].set_ylabel(plots.LABELS["gsc"] + " to the output")
    seeds = frame["seed"].nunique()
    figure.suptitle(f"Mean over {seeds} seeds, bars: 95 % interval; crosses: mean field", fontsize=10)
    return figure


def _profiles(ax: Axes, frame: pd.DataFrame, kinds: tuple[str, ...]) -> None:
    colors = dict(zip(WORDS, sns.color_palette("colorblind", len(WORDS)), strict=True))
    markers = dict(zip(WORDS, "os^DvP*", strict=True))
    for number, kind in enumerate(kinds):
        rows = _rows(frame)
        rows = rows[rows["kind"] == kind]
        means = [mean(values) for _, values in rows.groupby("index", observed=True)["log10_value"]]
        places = np.arange(len(means)) + 0.07 * (number - (len(kinds) - 1) / 2)
        errors = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
        ax.errorbar(
            places, [m.value for m in means], yerr=errors, fmt="-", marker=markers[kind], color=colors[kind],
            markersize=4, linewidth=1.2, elinewidth=0.8, label=WORDS[kind],
        )  # fmt: skip
        predicted = np.log10(_predicted(frame, kind))
        if number == 0 or predicted.any():  # those that keep GSC all have the same
            ax.plot(places, predicted, "x", color="0.2", markersize=6, label="mean field" if number == 0 else None)
    names = rows.drop_duplicates("index").sort_values("index")["layer"]
    ax.set_xticks(range(len(names)), names, rotation=60, fontsize=9)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
