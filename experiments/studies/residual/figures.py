"""Figures of the study residual."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.studies.residual import measurement, numbers
from experiments.studies.residual.measurement import BRANCHES, DILUTIONS, UNIT
from experiments.studies.residual.numbers import CASES, TOLERANCE, name
from gradscope import plots


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of the law, of growth with depth, of single blocks, and of the ResNet."""
    frame = collected.frame
    return {"law": _law(frame), "growth": _growth(frame), "blocks": _blocks(frame), "resnet": _resnet(frame)}


def _law(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 4.6), layout="constrained")
    at = np.linspace(0, 4.2, 200)
    for number, (color, branch) in enumerate(zip(COLORS, BRANCHES, strict=False)):
        places = [float(k) + 0.03 * (2 * number - 1) for k in DILUTIONS]
        excess = [means.mean(numbers.rates(frame, branch, k) - 1) for k in DILUTIONS]
        means.errorbars(ax, places, excess, fmt="os"[number], color=color, capsize=3, markersize=5,
                        label=f"{name(branch)}, measured")  # fmt: skip
        r = numbers.branch_rate(frame, branch)
        ax.plot(at, (r - 1) / (at**2 + 1), color=color, linewidth=1, linestyle=(0, (4, 2.5)),
                label=f"{name(branch)}, (r - 1) / (k$^2$ + 1), r = {r:.3f}")  # fmt: skip
    ax.set(yscale="log", xlabel="dilution k = |skip| / |branch|", ylabel="GSC rate per block (squared) minus 1")
    ax.set_title(f"Constant dilution; mean over {frame['seed'].nunique()} seeds, bars: 95 % interval", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure


def _growth(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(len(BRANCHES), 2, figsize=(10.4, 7.4), layout="constrained")
    words = {k: "no skip" if k == "0" else f"k = {k}" for k in ("0", "1", "2")} | {UNIT: "unit skips"}
    for (left, right), branch in zip(axes, BRANCHES, strict=True):
        _draw_growth(left, frame, branch, words, tuple(words))
        _draw_growth(right, frame, branch, words, (UNIT,))
        left.set_title(name(branch), fontsize=10)
        right.set_title(f"{name(branch)}, unit skips, logarithmic depth", fontsize=10)
        right.set_xscale("log")
        right.set_xticks(measurement.REACHED, [str(number) for number in measurement.REACHED])
        right.minorticks_off()
        left.set_ylabel(plots.LABELS["gsc"])
        for ax in (left, right):
            ax.set_xlabel("blocks from the stem")
    axes[0, 0].legend(frameon=False, fontsize=9)
    about = f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval, dashed: the law"
    figure.suptitle(f"GSC from the stem to a block; {about}", fontsize=11)
    return figure


def _draw_growth(ax: Axes, frame: pd.DataFrame, branch: str, words: dict[str, str], shown: tuple[str, ...]) -> None:
    reached = np.array(measurement.REACHED)
    for color, marker, (dilution, word) in zip(COLORS, "os^D", words.items(), strict=False):
        if dilution not in shown:
            continue
        found = [means.mean(column) for column in numbers.from_stem(frame, f"{branch}-{dilution}").T]
        means.errorbars(ax, reached, found, fmt=f"{marker}-", color=color, markersize=4, linewidth=1.2, capsize=2,
                        label=word)  # fmt: skip
        ax.plot(reached, numbers.expected(frame, branch, dilution)[reached], color="0.15", linewidth=0.9,
                linestyle=(0, (4, 2.5)), zorder=3)  # fmt: skip
    sns.despine(ax=ax)


def _blocks(frame: pd.DataFrame) -> Figure:
    figure, (ax, right) = plt.subplots(1, 2, figsize=(11.4, 5.0), layout="constrained", width_ratios=(1.1, 1))
    words = {branch: name(branch) for branch in BRANCHES} | {"relu": "relu", "relu_end": "relu, branch ends in it"}
    for number, (color, branch) in enumerate(zip(COLORS, words, strict=False)):
        table = numbers.single_blocks(frame, branch)
        ax.plot(table["law"], table["block_gsc"], "os^D"[number], color=color, markersize=3.5, alpha=0.5,
                linestyle="none", markeredgewidth=0, label=words[branch])  # fmt: skip
        if branch in BRANCHES:
            found = [means.mean(numbers.block_excess(table, f"{branch}-{case}")) for case in CASES]
            means.errorbars(right, np.arange(len(CASES)) + 0.1 * (2 * number - 1), found, fmt="os^D"[number],
                            color=color, markersize=5, capsize=3, label=words[branch])  # fmt: skip
    low, high = ax.get_xlim()
    ax.plot([low, high], [low, high], color="0.3", linewidth=0.9, zorder=0)
    ax.set(xlabel="(k$^2$ + r) / (k$^2$ + 1), k and r of the same block", ylabel="GSC of the block (squared)")
    ax.legend(frameon=False, fontsize=9, markerscale=2)
    right.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="0.92", zorder=0)
    right.axhline(1, color="0.3", linewidth=0.9, zorder=0)
    right.set_xticks(range(len(CASES)), [word.replace(" at ", "\n") for word in CASES.values()])
    right.set(ylabel="(GSC - 1), measured / law", xlabel="dilution")
    right.legend(frameon=False, fontsize=9, loc="upper left")
    sns.despine(figure)
    about = f"{frame['seed'].nunique()} seeds; line: the law, bars: 95 % interval, gray: tolerance"
    figure.suptitle(f"Single blocks, {about}", fontsize=11)
    return figure


def _resnet(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    words = {"resnet-0": "without skip connections", f"resnet-{UNIT}": "with skip connections"}
    for color, marker, (case, word) in zip(COLORS, "os", words.items(), strict=False):
        values = numbers.profile(frame, case, columns="layer")
        middle, spread = values.mean(), values.std()
        places = np.arange(len(middle))
        ax.plot(places, middle, f"{marker}-", color=color, markersize=4,
                label=f"{word}: $10^{{{numbers.block_totals(frame, case).mean():.2f}}}$ in all")  # fmt: skip
        ax.fill_between(places, middle - spread, middle + spread, color=color, alpha=0.2, linewidth=0)
        ax.set_xticks(places, list(values.columns), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="block, from the input to the output", ylabel=f"{plots.LABELS['gsc']}, to the logits")
    about = f"mean over {frame['seed'].nunique()} seeds, band: one standard deviation"
    ax.set_title(f"ResNet of {measurement.RESNET_DEPTH} layers; {about}", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure
