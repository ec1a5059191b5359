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
from experiments.studies.transformer_depth.numbers import DEPTHS, NORMS, SCALED, name

LABEL = "log10 GSC (squared) of the embedding"


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of GSC against the depth, with scaled weights, and of the length of the stream."""
    frame = collected.frame
    return {"growth": _growth(frame), "scaled": _scaled(frame), "lengths": _lengths(frame)}


def _growth(frame: pd.DataFrame) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True)
    for ax in (left, right):
        _curves(ax, {norm: numbers.totals(frame, norm) for norm in NORMS})
    _logarithmic(right)
    left.set(ylabel=LABEL)
    left.set_title("linear depth: an exponential is a straight line", fontsize=10)
    right.set_title("logarithmic depth: a power is a straight line", fontsize=10)
    left.legend(frameon=False)
    figure.suptitle(f"GSC from the embedding to the last block; {_about(frame)}", fontsize=11)
    return figure


def _scaled(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    _curves(ax, {norm: numbers.totals(frame, norm, SCALED) for norm in NORMS})
    _logarithmic(ax)
    ax.set_ylabel(LABEL)
    ax.set_title(f"Residual weights times 1 / sqrt(2 depth); {_about(frame)}", fontsize=10)
    ax.legend(frameon=False)
    return figure


def _lengths(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    _curves(ax, {norm: numbers.lengths(frame, norm) for norm in NORMS})
    _logarithmic(ax)
    ax.set_ylabel("log10 squared length, last block / embedding")
    ax.set_title(f"Residual stream, weights not scaled; {_about(frame)}", fontsize=10)
    ax.legend(frameon=False)
    return figure


def _curves(ax: Axes, tables: dict[str, pd.DataFrame]) -> None:
    for norm, table in tables.items():
        place = NORMS.index(norm)
        found = [means.mean(table[depth]) for depth in DEPTHS]
        apart = [depth * 1.02 ** (2 * place - 1) for depth in DEPTHS]
        means.errorbars(ax, apart, found, fmt=f"{'os'[place]}-", color=COLORS[place], markersize=5, linewidth=1.2,
                        capsize=3, label=name(norm))  # fmt: skip
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlabel("blocks")
    sns.despine(ax=ax)


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    ax.minorticks_off()


def _about(frame: pd.DataFrame) -> str:
    return f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
