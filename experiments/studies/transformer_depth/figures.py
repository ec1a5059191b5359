"""Figures of the study transformer_depth."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.studies.transformer_depth import numbers
from experiments.studies.transformer_depth.numbers import DEPTHS, NORMS, SCALED, name
from experiments.studies.transformer_depth.theory import BRANCHES

LABEL = r"$\log_{10}$ GSC (squared) of the embedding"
MARKERS = "os"


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of GSC against the depth, with scaled weights, beside theory, and of the residual ledger."""
    frame = collected.frame
    return {
        "growth": _growth(frame),
        "theory": _theory(frame),
        "skips": _skips(frame),
        "lengths": _lengths(frame),
        "scaled": _scaled(frame),
    }


def _growth(frame: pd.DataFrame) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True)
    for ax in (left, right):
        _curves(ax, {norm: numbers.totals(frame, norm) for norm in NORMS})
    _logarithmic(right)
    left.set(ylabel=LABEL)
    left.set_title("linear depth: an exponential is a straight line", fontsize=10)
    right.set_title("logarithmic depth: a power is a straight line", fontsize=10)
    left.legend(frameon=False)
    figure.suptitle(f"GSC from the embedding to the logits; {_about(frame)}", fontsize=11)
    return figure


def _scaled(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    _curves(ax, {norm: numbers.totals(frame, norm, SCALED) for norm in NORMS})
    _logarithmic(ax)
    ax.set_ylabel(LABEL)
    ax.set_title(f"Residual weights times 1 / sqrt(2 depth); {_about(frame)}", fontsize=10)
    ax.legend(frameon=False)
    return figure


def _theory(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True)
    for place, (ax, norm) in enumerate(zip(axes, NORMS, strict=True)):
        found = numbers.totals(frame, norm)
        line, low, high = (
            numbers.by_depth(frame, norm, f"log10_gsc_{part}").mean()[list(DEPTHS)]
            for part in ("theory", "low", "high")
        )
        for depth in DEPTHS:
            apart = depth * 1.1 ** np.linspace(-1, 1, len(found))
            dots = ax.plot(apart, found[depth], MARKERS[place], color=COLORS[place], markersize=3, markeredgewidth=0)
        dots[0].set_label("single networks")
        ax.plot(DEPTHS, line, "--", color="black", linewidth=1.2, label="theory")
        ax.fill_between(DEPTHS, low, high, color="0.85", zorder=0, label="band of theory")
        _logarithmic(ax)
        ax.set_xlabel("blocks")
        ax.set_title(name(norm), fontsize=10)
        ax.legend(frameon=False, loc="lower left")
        sns.despine(ax=ax)
    axes[0].set_ylabel(LABEL)
    figure.suptitle(f"GSC of single networks and mean-field theory; {frame['seed'].nunique()} seeds", fontsize=11)
    return figure


def _skips(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.4, 4.4), layout="constrained", sharey=True)
    for ax, branch in zip(axes, BRANCHES, strict=True):
        for place, norm in enumerate(NORMS):
            table, line = numbers.shares(frame, norm, branch), numbers.shares(frame, norm, branch, "_theory").mean()
            places = [int(block) + 1 for block in table.columns.to_numpy()]  # a logarithmic axis has no 0
            found = [means.mean(table[block]) for block in table]
            means.errorbars(ax, places, found, fmt=MARKERS[place], color=COLORS[place], markersize=5, capsize=3,
                            label=f"{name(norm)}, measured")  # fmt: skip
            ax.plot(places, line, ["--", ":"][place], color=COLORS[place], linewidth=1.5, label=f"{name(norm)}, theory")
        ax.set_xscale("log")
        ax.set_xticks(places, [str(place - 1) for place in places])
        ax.minorticks_off()
        ax.set(xlabel=f"block, of {DEPTHS[-1]} (counted from 0)", ylim=(0, 1.02))
        ax.set_title({"attention": "skip around attention", "mlp": "skip around the MLP"}[branch], fontsize=10)
        sns.despine(ax=ax)
    axes[0].set_ylabel("share of the squared Jacobian\nthat passes through the skip")
    axes[0].legend(frameon=False, loc="lower right")
    figure.suptitle(f"Skip shares; {_about(frame)}", fontsize=11)
    return figure


def _lengths(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 4.4), layout="constrained")
    _curves(ax, {norm: numbers.lengths(frame, norm) for norm in NORMS}, line="")
    for place, norm in enumerate(NORMS):
        predicted = numbers.by_depth(frame, norm, "log10_square_growth_theory").mean()[list(DEPTHS)]
        ax.plot(DEPTHS, predicted, ["--", ":"][place], color=COLORS[place], label=f"{name(norm)}, theory")
    _logarithmic(ax)
    ax.set_ylabel(r"$\log_{10}$ squared length, last block / embedding")
    ax.set_title(f"Residual stream, weights not scaled; {_about(frame)}", fontsize=10)
    ax.legend(frameon=False)
    return figure


def _curves(ax: Axes, tables: dict[str, pd.DataFrame], line: str = "-") -> None:
    for norm, table in tables.items():
        place = NORMS.index(norm)
        found = [means.mean(table[depth]) for depth in DEPTHS]
        apart = [depth * 1.02 ** (2 * place - 1) for depth in DEPTHS]
        style: dict[str, Any] = {"fmt": f"{MARKERS[place]}{line}", "color": COLORS[place], "label": name(norm)}
        means.errorbars(ax, apart, found, **style, markersize=5, linewidth=1.2, capsize=3)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xlabel("blocks")
    sns.despine(ax=ax)


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    ax.minorticks_off()


def _about(frame: pd.DataFrame) -> str:
    return f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
