"""Figures of the study remedies."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.studies.remedies import numbers
from experiments.studies.remedies.measurement import NONE
from experiments.studies.remedies.numbers import MEASURES, NAMES, REMEDIES, TWINS, Outcome, Outcomes

TOTAL = r"$\log_{10}$ GSC (squared), input to output"
LABELS = {
    "nonlinearity": "part of the outputs' variance\nthat is not affine",
    "last_layer": "linear fit error\nof the last layer",
    "nlc": "nonlinearity coefficient (NLC)",
}


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of GSC with each remedy, and of the nonlinearity that each remedy leaves."""
    found = numbers.outcomes(collected.frame)
    return {"growth": _growth(found), "cost": _cost(found)}


def _growth(found: Outcomes) -> Figure:
    figure, axes = plt.subplots(2, len(found), figsize=(12.6, 8.0), layout="constrained")
    for column, (baseline, by_remedy) in zip(axes.T, found.items(), strict=True):
        order = sorted(by_remedy, key=lambda remedy: by_remedy[remedy].total.mean())
        _draw_bars(column[0], by_remedy, order, "total")
        column[0].set(xlabel=TOTAL, title=NAMES[baseline])
        _draw_bars(column[1], by_remedy, order, "rate")
        for place, remedy in enumerate(order):
            if not math.isnan(theory := by_remedy[remedy].theory):
                column[1].plot(theory, place, "|", color="0.15", markersize=13, markeredgewidth=1.6)
        column[1].set(xlabel="GSC rate per layer; strokes: mean field")
    about = f"mean over {_num_seeds(found)} seeds, bars: 95 % interval"
    figure.suptitle(f"Remedies at equal parameters; {about}", fontsize=11)
    return figure


def _draw_bars(ax: Axes, by_remedy: dict[str, Outcome], order: list[str], name: str) -> None:
    for place, remedy in enumerate(order):
        fmt, color = ("s", COLORS[3]) if remedy == NONE else ("o", COLORS[0])
        found = [means.mean(getattr(by_remedy[remedy], name))]
        means.errorbars(ax, [place], found, horizontal=True, fmt=fmt, color=color, capsize=3, markersize=5)
    ax.axvline(0.0 if name == "total" else 1.0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(order)), [REMEDIES[remedy] for remedy in order])
    sns.despine(ax=ax)


def _cost(found: Outcomes) -> Figure:
    """All three measures of nonlinearity against growth; hollow markers for networks that repeat another network."""
    figure, axes = plt.subplots(len(MEASURES), len(found), figsize=(12.6, 9.6), layout="constrained", sharex="col")
    styles, shown = _styles(), {}
    for column, (baseline, by_remedy) in zip(axes.T, found.items(), strict=True):
        for ax, measure in zip(column, MEASURES, strict=True):
            for remedy, outcome in by_remedy.items():
                color, marker = styles[remedy]
                hollow = remedy in TWINS[baseline]
                total, level = means.mean(outcome.total), numbers.level(outcome, measure)
                face, edge, width = ("white", color, 1.5) if hollow else (color, "0.2", 0.5)
                bars = ax.errorbar(
                    total.value, level.value, xerr=means.errors([total]), yerr=means.errors([level]),
                    fmt=marker, color=color, markersize=5 if remedy == NONE else 7, capsize=2, elinewidth=1,
                    zorder=4 if remedy == NONE else 2,
                    markerfacecolor=face, markeredgecolor=edge, markeredgewidth=width,
                )  # fmt: skip
                if remedy not in shown or not hollow:
                    shown[remedy] = bars
            if measure != "nonlinearity":
                ax.set_yscale("log")
            sns.despine(ax=ax)
        column[0].set_title(NAMES[baseline])
        column[-1].set_xlabel(TOTAL)
    for ax, measure in zip(axes[:, 0], MEASURES, strict=True):
        ax.set_ylabel(LABELS[measure])
    words = {remedy: word for remedy, word in REMEDIES.items() if remedy in shown}
    handles = [shown[remedy] for remedy in words]
    figure.legend(handles, list(words.values()), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(
        f"Growth and nonlinearity; mean over {_num_seeds(found)} seeds, bars: 95 % interval, hollow: to mean field the "
        "same network as another",
        fontsize=11,
    )
    return figure


def _styles() -> dict[str, tuple[Any, str]]:
    """Color and marker of every remedy; the unchanged network is black."""
    markers = "oD^vP<>Xp*dh"
    others = [remedy for remedy in REMEDIES if remedy != NONE]
    styles = {remedy: (COLORS[n], markers[n]) for n, remedy in enumerate(others)}
    return {NONE: ((0.0, 0.0, 0.0), "s"), **styles}


def _num_seeds(found: Outcomes) -> int:
    return len(next(iter(found.values()))[NONE].total)
