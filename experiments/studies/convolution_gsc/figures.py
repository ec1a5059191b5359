"""Figures of the study of GSC in convolutional networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.colors import COLORS
from experiments.evidence.means import errorbars, mean
from experiments.studies.convolution_gsc import numbers as of
from experiments.studies.convolution_gsc.numbers import KEEPING, POOLING, UNCHANGED, WORDS
from experiments.studies.convolution_gsc.stacks import FloatArray
from gradscope.plots.drawing import name_layers


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of the factors of whole stacks, and of the profiles of all layers."""
    return {"total": total(collected.frame), "layers": layers(collected.frame)}


def total(frame: pd.DataFrame) -> Figure:
    """Factors of stride and padding in the left panel, and factors of pooling in the right panel."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.6), layout="constrained")
    for ax, kinds in ((left, KEEPING), (right, POOLING)):
        _draw_factors(ax, frame, kinds)
    left.axvspan(1 / UNCHANGED, UNCHANGED, color="0.92", zorder=0, label=f"within {100 * (UNCHANGED - 1):.0f} %")
    left.axvline(1, color="0.6", linewidth=0.8, zorder=0)
    left.set_xlim(0.98 / UNCHANGED, 1.02 * UNCHANGED)
    left.set_title("stride and padding", fontsize=10)
    right.set(xscale="log", xlim=(0.02, 1.0))
    right.set_title("pooling", fontsize=10)
    right.set_xticks([0.03, 0.1, 0.3, 1], ["0.03", "0.1", "0.3", "1"])
    right.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    seeds, channels = frame["seed"].nunique(), int(frame["channels"].iloc[0])
    stack = f"{of.depth(frame)} convolutions of {channels} channels, seed by seed; {seeds} seeds"
    figure.suptitle(f"GSC (squared convention), input to output, relative to the torus: {stack}", fontsize=10)
    return figure


def _draw_factors(ax: Axes, frame: pd.DataFrame, kinds: tuple[str, ...]) -> None:
    colors, places = COLORS, np.arange(len(kinds))
    style = {"fmt": "o", "color": colors[0], "capsize": 3, "label": "measured, 95 % interval"}
    errorbars(ax, places, [of.factor(frame, kind) for kind in kinds], horizontal=True, **style)
    theory = [of.predicted(frame, kind)[0] for kind in kinds]
    ax.plot(theory, places - 0.18, "x", color=colors[1], markersize=8, markeredgewidth=2, label="mean field")
    ax.set_yticks(range(len(kinds)), [WORDS[kind] for kind in kinds])
    ax.set(xlabel="factor", ylim=(len(kinds) - 0.5, -0.5))
    sns.despine(ax=ax)


def layers(frame: pd.DataFrame) -> Figure:
    """Profiles for stride and padding, divided by the profile of the torus, and profiles for both kinds of pooling."""
    figure, axes = plt.subplots(1, 3, figsize=(13.2, 4.2), layout="constrained")
    axes[2].sharey(axes[1])
    names = list(of.profile(frame, of.REFERENCE).index)
    for number, kind in enumerate(KEEPING):
        relative = np.log10([of.factors(frame, place)[kind] for place in range(of.depth(frame) + 1)])
        _draw_profile(axes[0], names, relative, frame, kind, 0.16 * (number - (len(KEEPING) - 1) / 2))
    for ax, kind in zip(axes[1:], POOLING, strict=True):
        table = of.profile(frame, kind)
        _draw_profile(ax, list(table.index), table.to_numpy(), frame, kind, 0.0)
        ax.set_title(WORDS[kind], fontsize=10)
    axes[0].set_title("stride and padding, minus the torus", fontsize=10)
    axes[0].set_ylabel(r"$\log_{10}$ GSC to the output, difference to the torus")
    axes[1].set_ylabel(r"$\log_{10}$ GSC to the output")
    axes[2].tick_params(labelleft=False)
    axes[0].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[0].set_ylim(top=axes[0].get_ylim()[1] + 0.015)  # room for the legend
    axes[0].legend(frameon=False, fontsize=9, loc="upper center", ncols=2)
    seeds = f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval; crosses: mean field"
    figure.suptitle(f"GSC (squared convention) of every layer: {seeds}", fontsize=10)
    return figure


def _draw_profile(
    ax: Axes, names: Sequence[str], table: FloatArray, frame: pd.DataFrame, kind: str, beside: float
) -> None:
    """Draw ``table`` (layers, seeds) of one stack, and mean field unless it is 0 for all layers."""
    number = list(WORDS).index(kind)
    color, marker = COLORS[number], "os^DvP*"[number]
    places, theory = np.arange(len(names)) + beside, np.log10(of.predicted(frame, kind))
    style: dict[str, Any] = {
        "fmt": "-",
        "marker": marker,
        "color": color,
        "markersize": 4,
        "linewidth": 1.2,
        "elinewidth": 0.9,
    }
    errorbars(ax, places, [mean(values) for values in table], label=WORDS[kind], **style)
    if theory.any():
        ax.plot(places, theory, "x", color="0.2", markersize=6)
    name_layers(ax.xaxis, range(len(names)), names)
    sns.despine(ax=ax)
