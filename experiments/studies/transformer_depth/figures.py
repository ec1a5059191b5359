"""Figures of the study transformer_depth."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.studies.transformer_depth import numbers
from experiments.studies.transformer_depth.numbers import DEPTHS, NORMS, SCALED, UNIT, name

LABEL = "log10 GSC (squared) of the embedding"


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of GSC against the depth without and with scaled weights, and of the length of the stream."""
    frame = collected.frame
    return {"growth": _growth(frame), "scaled": _scaled(frame), "lengths": _lengths(frame)}


def _growth(frame: pd.DataFrame) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True)
    for ax in (left, right):
        _curves(ax, {norm: numbers.totals(frame, norm) for norm in NORMS})
    _logarithmic(right)
    left.set(title="an exponential is a straight line", ylabel=LABEL)
    right.set(title="logarithmic axis: a power of the depth is a straight line")
    left.legend(frameon=False)
    figure.suptitle(f"GSC from the embedding to the last block; {_about(frame)}", fontsize=11)
    return figure


def _scaled(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained")
    words = {UNIT: "residual weights not scaled", SCALED: "residual weights times 1 / sqrt(2 depth)"}
    for ax, (scale, word) in zip(axes, words.items(), strict=True):
        _curves(ax, {norm: numbers.totals(frame, norm, scale) for norm in NORMS})
        _logarithmic(ax)
        ax.set(title=word, ylabel=LABEL)
    axes[0].legend(frameon=False)
    figure.suptitle(f"GSC from the embedding to the last block; {_about(frame)}", fontsize=11)
    return figure


def _lengths(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    _curves(ax, {norm: numbers.lengths(frame, norm) for norm in NORMS})
    _logarithmic(ax)
    ax.set(ylabel="log10 squared length, last block / embedding", title=f"Residual stream; {_about(frame)}")
    ax.title.set_fontsize(10)
    ax.legend(frameon=False)
    return figure


def _curves(ax: Axes, tables: dict[str, pd.DataFrame]) -> None:
    for color, marker, (norm, table) in zip(COLORS, "os^", tables.items(), strict=False):
        found = [means.mean(table[depth]) for depth in DEPTHS]
        means.errorbars(ax, DEPTHS, found, fmt=f"{marker}-", color=color, markersize=5, linewidth=1.2, capsize=3,
                        label=name(norm))  # fmt: skip
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlabel("blocks")
    sns.despine(ax=ax)


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    ax.minorticks_off()


def _about(frame: pd.DataFrame) -> str:
    return f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
