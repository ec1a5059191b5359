"""What stride, padding and pooling do to GSC: stacks of convolutions that share their weights."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.means import Mean, geometric_mean, mean
from experiments.evidence.study import Claim, Study
from experiments.studies.convolution_gsc import stacks
from gradscope import plots

# Of the configuration; the tests hold them against it.
STAGES, CONVS, CHANNELS, SIDE, NUM_SAMPLES, NUM_PROBES = 3, 2, 64, 16, 4, 8
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

QUESTION = "What do stride, padding and pooling do to the gradients of a convolutional network?"
METHOD = f"""
Stacks of {STAGES} stages of {CONVS} convolutions 3 x 3 with ReLU, {CHANNELS} channels, He's weights, no biases, on
Gaussian noise of {SIDE} x {SIDE} pixels, {NUM_SAMPLES} samples, {NUM_PROBES} probes. The stacks of one seed have the
same weights and see the same noise; they differ in one thing:

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
HOW_SURE = f"""
Intervals are over initializations and noise, 95 %, Student's t of the logarithm. A total that changes by less than
{100 * (UNCHANGED - 1):.0f} % counts as unchanged. Mean field, which is for infinitely many channels, is granted
{100 * (TOLERANCE - 1):.0f} % a layer, a margin that was chosen after trial runs, not before. All of it is for white
noise: the pixels of pictures are correlated from the start, and then average pooling lowers GSC more from the first
stage on.
"""


def figures(collected: Collected) -> dict[str, Figure]:
    """What each kind does to the total, and profiles by layer."""
    return {"total": _total(collected.frame), "layers": _layers(collected.frame)}


def claims(collected: Collected) -> list[Claim]:
    """What keeps GSC, what lowers it, and whether by as much as predicted."""
    frame = collected.frame
    found = {kind: factor(frame, kind) for kind in (*KEEPING, *POOLING)}
    half, apart = _depth(frame) // 2, _apart(frame)
    middle = factor(frame, "zeros", half)
    kept = f"changes GSC of a whole stack by less than {100 * (UNCHANGED - 1):.0f} %"
    return [
        *(_near(f"{WORDS[kind].capitalize()} {kept}", found[kind], 1.0, UNCHANGED) for kind in KEEPING),
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
    frame = collected.frame
    found = {kind: factor(frame, kind) for kind in (*KEEPING, *POOLING)}
    kept = [kind for kind in KEEPING if _within(found[kind], 1.0, UNCHANGED)]
    text = []
    if kept:
        most = max(abs(math.log(found[kind].value)) for kind in kept)
        text.append(
            f"These keep GSC over a whole stack: {_listed(kept)}; they change it by {100 * math.expm1(most):.1f} % at "
            "most."
        )
    if others := [kind for kind in KEEPING if kind not in kept]:
        text.append(f"Not shown to keep it: {_listed(others)}.")
    if lowered := [kind for kind in POOLING if _lowers(found[kind])]:
        by = ", ".join(f"{WORDS[kind]} by a factor of {1 / found[kind].value:.1f}" for kind in lowered)
        text.append(f"Pooling 2 x 2, once a stage, lowers it: {by}.")
    if _lowers(_apart(frame)):
        text.append(
            "An average keeps what the values of a window have in common, and of a random change that is little."
        )
    return " ".join(text)


def _listed(kinds: list[str]) -> str:
    return ", ".join(WORDS[kind] for kind in kinds)


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


def _apart(frame: pd.DataFrame) -> Mean:
    """Average over max pooling, seed by seed."""
    totals = _factors(frame)
    return geometric_mean(totals["average"] / totals["max"])


def _within(found: Mean, expected: float, margin: float) -> bool | None:
    """Whether a factor is the expected one within the factor ``margin``, whole interval and all."""
    inside = found.low > expected / margin and found.high < expected * margin
    outside = found.high < expected / margin or found.low > expected * margin
    return True if inside else False if outside else None


def _near(says: str, found: Mean, expected: float, margin: float) -> Claim:
    return Claim(
        says,
        _within(found, expected, margin),
        f"factor {found:.3f}, expected {expected:.3f}, accepted {expected / margin:.3f} to {expected * margin:.3f}",
    )


def _total(frame: pd.DataFrame) -> Figure:
    """Stride and padding beside 1, pooling far from it: on axes of their own."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained")
    for ax, kinds in ((left, KEEPING), (right, POOLING)):
        _draw_factors(ax, frame, kinds)
    left.axvspan(1 / UNCHANGED, UNCHANGED, color="0.92", zorder=0, label=f"{100 * (UNCHANGED - 1):.0f} %")
    left.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    left.set(xlim=(0.98 / UNCHANGED, 1.02 * UNCHANGED))
    left.set_title("stride and padding", fontsize=10)
    right.set(xscale="log", xlim=(0.02, 1.0))
    right.set_title("pooling", fontsize=10)
    right.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    seeds, channels = frame["seed"].nunique(), int(frame["channels"].iloc[0])
    figure.suptitle(
        f"GSC (squared convention), input to output, relative to the torus: {_depth(frame)} convolutions of {channels} "
        f"channels, seed by seed; {seeds} seeds",
        fontsize=10,
    )
    return figure


def _draw_factors(ax: Axes, frame: pd.DataFrame, kinds: tuple[str, ...]) -> None:
    colors = sns.color_palette("colorblind")
    for place, kind in enumerate(kinds):
        found = factor(frame, kind)
        error = [[found.value - found.low], [found.high - found.value]]
        label = "measured, 95 % interval" if place == 0 else None
        ax.errorbar(found.value, place, xerr=error, fmt="o", color=colors[0], capsize=3, label=label)
        label = "mean field" if place == 0 else None
        ax.plot(
            _predicted(frame, kind)[0], place - 0.18, "x", color=colors[1], markersize=8, markeredgewidth=2, label=label
        )
    ax.set_yticks(range(len(kinds)), [WORDS[kind] for kind in kinds])
    ax.set(xlabel="factor", ylim=(len(kinds) - 0.5, -0.5))
    sns.despine(ax=ax)


def _layers(frame: pd.DataFrame) -> Figure:
    """Stride and padding seed by seed against the torus, on an axis of their own; both poolings on another."""
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 4.2), layout="constrained")
    axes[2].sharey(axes[1])
    names, depth = _names(frame, REFERENCE), _depth(frame)
    for number, kind in enumerate(KEEPING):
        relative = np.log10([_factors(frame, place)[kind] for place in range(depth + 1)])
        predicted = np.log10(_predicted(frame, kind))
        _profile(axes[0], names, relative, predicted, kind, 0.16 * (number - (len(KEEPING) - 1) / 2))
    for ax, kind in zip(axes[1:], POOLING, strict=True):
        rows = _rows(frame)[_rows(frame)["kind"] == kind]
        table = rows.pivot_table(index="index", columns="seed", values="log10_value", observed=True)
        _profile(ax, _names(frame, kind), table.to_numpy(), np.log10(_predicted(frame, kind)), kind, 0.0)
        ax.set_title(WORDS[kind], fontsize=10)
    axes[0].set_title("stride and padding, less that of the torus", fontsize=10)
    for ax, words in ((axes[0], "\nto the output, difference to the torus"), (axes[1], " to the output")):
        ax.set_ylabel(plots.LABELS["gsc"] + words)
    axes[0].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[0].set_ylim(top=axes[0].get_ylim()[1] + 0.015)  # room for the legend
    axes[0].legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    seeds = frame["seed"].nunique()
    figure.suptitle(f"Mean over {seeds} seeds, bars: 95 % interval; crosses: mean field", fontsize=10)
    return figure


def _names(frame: pd.DataFrame, kind: str) -> list[str]:
    """The input and the layers of a stack, in order."""
    rows = _rows(frame)[_rows(frame)["kind"] == kind]
    return list(rows.drop_duplicates("index").sort_values("index")["layer"])


def _profile(
    ax: Axes, names: list[str], table: stacks.FloatArray, predicted: stacks.FloatArray, kind: str, beside: float
) -> None:
    """Layers x seeds, with what mean field says of each layer."""
    color = dict(zip(WORDS, sns.color_palette("colorblind", len(WORDS)), strict=True))[kind]
    marker = dict(zip(WORDS, "os^DvP*", strict=True))[kind]
    means, places = [mean(values) for values in table], np.arange(len(names)) + beside
    errors = [[m.value - m.low for m in means], [m.high - m.value for m in means]]
    ax.errorbar(
        places, [m.value for m in means], yerr=errors, fmt="-", marker=marker, color=color, markersize=4, linewidth=1.2,
        elinewidth=0.9, label=WORDS[kind],
    )  # fmt: skip
    if predicted.any():  # a line at 0 says it of those that keep GSC
        ax.plot(places, predicted, "x", color="0.2", markersize=6)
    ax.set_xticks(range(len(names)), names, rotation=60, fontsize=9)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)


STUDY = Study(
    question=QUESTION,
    method=METHOD,
    how_sure=HOW_SURE,
    claims=claims,
    answer=answer,
    figures=figures,
)
