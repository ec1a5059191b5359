"""Figures of alarms: how often each signal warns before failures, and how long before."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.evidence.alarms import Alarms, leads
from experiments.evidence.colors import COLORS


def warnings(alarms: Alarms, words: Mapping[str, str], cells: str) -> Figure:
    """Bars for each signal: percentage of failing runs that it announces, and of controls in which it fires.

    ``words``: the name of each signal in words; ``cells``: what runs of a cell have in common, for the title.
    """
    figure, ax = plt.subplots(figsize=(8.2, 4.2), layout="constrained")
    names, colors = alarms.fired, COLORS
    warned = [alarms.part(alarms.leads[name].notna()) for name in names]
    parts = {
        f"warned before the failure, {len(alarms.leads)} failing runs": warned,
        f"false alarm to the last step, {len(alarms.false)} controls": map(alarms.false_alarms, names),
    }
    bars = {label: [(one.value, *one.interval) for one in found] for label, found in parts.items()}
    matched = map(alarms.matched, names)
    bars["false alarm, monitored as long as a failing run"] = [(one.value, one.low, one.high) for one in matched]
    for number, (label, values) in enumerate(bars.items()):
        value, low, high = 100 * np.array(values).reshape(-1, 3).T
        place = np.arange(len(names)) + 0.27 * (number - 1)
        hatch = ("", "", "///")[number]
        ax.bar(place, value, width=0.25, color=colors[number], label=label, hatch=hatch, edgecolor="white")
        margins = np.clip([value - low, high - value], 0, None)  # for 0 runs, the lower end is 0 up to rounding
        ax.errorbar(place, value, yerr=margins, fmt="none", color="black", linewidth=1, capsize=2)
    ax.set_xticks(range(len(names)), [words[name].replace(" ", "\n") for name in names])
    ax.set(ylabel="runs in %", ylim=(0, 138), yticks=range(0, 101, 20))
    ax.legend(frameon=False, fontsize=9, loc="upper center")
    ax.set_title(f"Warnings and false alarms; error bars: 95 %, over cells of {cells}", fontsize=10)
    sns.despine(ax=ax)
    return figure


def lead_dots(ax: Axes, alarms: Alarms, words: Mapping[str, str], end: str = "failure_step") -> None:
    """One dot per failure that a signal announces, at the number of steps from the signal to ``end``.

    Below the dots of a signal are the median and its interval.
    """
    found, names = leads(alarms.table, alarms.signals, end), alarms.fired
    for place, name in enumerate(names):
        known = found[name].dropna()
        ax.plot(known, place + _beside(known), "o", color=COLORS[0], alpha=0.4, markersize=4, markeredgewidth=0)
        if len(known):
            middle = alarms.median(found[name])
            if np.isfinite(middle.high):
                ax.plot([middle.low, middle.high], [place + 0.4] * 2, color="black", linewidth=2, zorder=5)
            ax.plot(middle.value, place + 0.4, "D", color="black", markersize=5, zorder=6)
        ax.text(1.0, place, f"warned {len(known)} of {len(found)}", transform=ax.get_yaxis_transform(),
                ha="right", va="center", fontsize=8, color="0.3")  # fmt: skip
    ax.set_yticks(range(len(names)), [words[name] for name in names])
    longest = float(np.nan_to_num(leads(alarms.table, alarms.signals).to_numpy()).max(initial=1.0))
    ax.set(xlim=(0, 1.35 * longest), ylim=(len(names) - 0.5, -0.6), ylabel="")
    sns.despine(ax=ax)


def _beside(values: pd.Series) -> pd.Series:
    """Vertical offsets around 0, so that dots of equal values do not cover each other."""
    equal = values.groupby(values)
    rank, num = equal.cumcount(), equal.transform("size")
    return (rank - (num - 1) / 2) * np.minimum(0.08, 0.8 / num)
