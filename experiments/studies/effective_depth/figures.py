"""Figures of the study of effective depth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.colors import COLORS
from experiments.evidence.means import errorbars, mean
from experiments.studies.effective_depth.measurement import TOLERANCES
from experiments.studies.effective_depth.numbers import SUFFERS, Key, Runs, name


def _styles(runs: Runs, keys: Iterable[Key]) -> Iterator[tuple[Key, object, str]]:
    """Each network with the color of its architecture and its line style: dashed if the network is residual."""
    colors = dict(zip(dict.fromkeys(key[:2] for key in runs.trained), COLORS, strict=False))
    yield from ((key, colors[key[:2]], "-" if key[2] == "none" else "--") for key in keys)


def _panel() -> tuple[Figure, Axes]:
    figure, ax = plt.subplots(figsize=(7.4, 4.6), layout="constrained")
    sns.despine(ax=ax)
    return figure, ax


def _band(ax: Axes, x: pd.Index, middle: Any, low: Any, high: Any, dash: str, label: str, color: object) -> None:
    ax.plot(x, middle, dash, color=color, label=label)
    ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of effective depth during training, of shares of contributions, and of losses with replaced layers."""
    runs = Runs(collected.frame)
    return {"effective_depth": over_training(runs), "contributions": contributions(runs), "taylor": replaced(runs)}


def over_training(runs: Runs) -> Figure:
    """Effective depth of the deepest networks during training, and of all networks at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.4), layout="constrained", width_ratios=(3, 2))
    for key, color, dash in _styles(runs, runs.deep):
        table = runs.by_seed(key, tolerance=TOLERANCES[0])
        middle, low, high = zip(*((one.value, one.low, one.high) for one in map(mean, table.to_numpy())), strict=True)
        _band(left, table.index, middle, low, high, dash, name(key, depth=False), color)
    left.set(xscale="log", xlabel="step", ylabel="effective depth [layers]", title="deepest networks, during training")
    handles_and_labels = left.get_legend_handles_labels()
    figure.legend(*handles_and_labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    architectures = list(dict.fromkeys(key[:3] for key in runs.trained))
    depths = sorted({key[3] for key in runs.trained})
    for key, color, dash in _styles(runs, runs.trained):
        place = architectures.index(key[:3]) + 0.16 * (2 * depths.index(key[3]) / max(1, len(depths) - 1) - 1)
        errorbars(
            right, [place], [mean(runs.final(key))], horizontal=True, color=color,
            marker="o" if dash == "-" else "s", markerfacecolor=color if key[3] == max(depths) else "white", capsize=3,
        )  # fmt: skip
        right.plot(runs.layers(key), place, "|", color="0.3", markersize=10, zorder=3)
    right.set(xlabel="effective depth [layers]", title="at the end of training", xlim=(0, None))
    right.set_yticks(range(len(architectures)), [name((*one, 0), depth=False) for one in architectures])
    right.invert_yaxis()
    num = len(runs.final(runs.deep[0]))
    figure.suptitle(f"Mean over {num} seeds, bars and bands: 95 % interval; strokes: number of layers", fontsize=10)
    for ax in (left, right):
        sns.despine(ax=ax)
    return figure


def contributions(runs: Runs) -> Figure:
    """Shares of the contributions of k trained layers, measured and for layers with independent directions."""
    figure, axes = plt.subplots(1, 2, figsize=(11.0, 4.6), layout="constrained", sharex=True, sharey=True)
    num = len(runs.final(runs.deep[0]))
    for key, color, _ in _styles(runs, runs.deep):
        ax = axes[int(key[2] != "none")]
        lines = (("contribution", "-", 1.6, name((*key[:2], "none", 0), depth=False)),
                 ("independent_contribution", ":", 1.2, None))  # fmt: skip
        for quantity, style, width, label in lines:
            shares = runs.rows(key, quantity).groupby("index", observed=True)["log10_value"]
            # The frame lacks the smallest shares.  A mean over the other seeds would jump up where one is missing.
            middle, spread = (found[shares.count() == num] for found in (shares.mean(), shares.std()))
            ax.plot(middle.index, middle, style, color=color, linewidth=width, label=label)
            if label is not None:
                ax.fill_between(middle.index, middle - spread, middle + spread, color=color, alpha=0.15, linewidth=0)
    for ax, words in zip(axes, ("plain networks", "with skip connections"), strict=True):
        ax.axhline(math.log10(TOLERANCES[0]), color="0.6", linewidth=0.8, zorder=0)
        ax.set(xlabel="number k of trained layers", ylim=(-12, 0.5), title=words)
        ax.legend(frameon=False, fontsize=9, loc="upper right")
        sns.despine(ax=ax)
    axes[0].set_ylabel(r"$\log_{10}$ share of the contribution $C^k$")
    figure.suptitle(
        f"After training: mean over {num} seeds, band: one standard deviation; "
        "dotted: layers with independent directions", fontsize=10,
    )  # fmt: skip
    return figure


def replaced(runs: Runs) -> Figure:
    """Loss minus the loss of the whole network, against the number of replaced layers."""
    figure, ax = _panel()
    for key, color, dash in _styles(runs, runs.deep):
        table = runs.taylor(key)
        middle, low, high = table.median(axis=1), table.min(axis=1), table.max(axis=1)
        _band(ax, table.index, middle, low, high, dash, name(key, depth=False), color)
    ax.axhline(SUFFERS, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="last layers replaced", ylabel="loss above that of the whole network")
    ax.set_yscale("symlog", linthresh=SUFFERS)
    ax.set_ylim(bottom=-SUFFERS)
    num = len(runs.final(runs.deep[0]))
    ax.set_title(f"After training: median over {num} seeds, band: from the lowest to the highest")
    ax.legend(frameon=False, fontsize=9)
    return figure
