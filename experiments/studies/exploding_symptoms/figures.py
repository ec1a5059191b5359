"""Figures of the study exploding_symptoms."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.evidence.colors import COLORS
from experiments.studies.exploding_symptoms.alarms import Alarms
from experiments.studies.exploding_symptoms.signals import FAILURE, THRESHOLDS, WORDS, leads

# Limits of the axis of signals divided by thresholds. On an axis with the exploding loss, other curves look flat.
SHOWN = (1e-7, 1e4)


def draw(alarms: Alarms, frame: pd.DataFrame) -> dict[str, Figure]:
    """All figures. The frame contains all steps of one run."""
    return {
        "warnings": _warnings(alarms),
        "leads": _leads(alarms),
        "one_run": _one_run(frame),
        "failures": _failures(alarms.table),
    }


def _warnings(alarms: Alarms) -> Figure:
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
    ax.set_xticks(range(len(names)), [WORDS[name] for name in names])
    ax.set(ylabel="runs in %", ylim=(0, 138), yticks=range(0, 101, 20))
    ax.legend(frameon=False, fontsize=9, loc="upper center")
    ax.set_title("Warnings and false alarms; error bars: 95 %, over cells of network and learning rate", fontsize=10)
    sns.despine(ax=ax)
    return figure


def _leads(alarms: Alarms) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained", sharex=True, sharey=True)
    ends, names = {"failure_step": "the failure", "nan_step": "a loss that is not finite"}, alarms.fired
    longest = max(float(np.nan_to_num(leads(alarms.table, end).to_numpy()).max(initial=1.0)) for end in ends)
    for ax, (end, words) in zip(axes, ends.items(), strict=True):
        found = leads(alarms.table, end)
        color = COLORS[0]
        for place, name in enumerate(names):
            known = found[name].dropna()
            ax.plot(known, place + _beside(known), "o", color=color, alpha=0.4, markersize=4, markeredgewidth=0)
            if len(known):
                middle = alarms.median(found[name])
                if np.isfinite(middle.high):
                    ax.plot([middle.low, middle.high], [place + 0.4] * 2, color="black", linewidth=2, zorder=5)
                ax.plot(middle.value, place + 0.4, "D", color="black", markersize=5, zorder=6)
            ax.text(1.0, place, f"warned {len(known)} of {len(found)}", transform=ax.get_yaxis_transform(),
                    ha="right", va="center", fontsize=8, color="0.3")  # fmt: skip
        ax.set_yticks(range(len(names)), [WORDS[name] for name in names])
        ax.set(xlabel=f"steps between the warning and {words}", ylabel="")
        ax.set(xlim=(0, 1.35 * longest), ylim=(len(names) - 0.5, -0.6))
        sns.despine(ax=ax)
    figure.suptitle(
        "One dot per warned run: of all runs that fail (left), of runs that reach a loss that is not finite (right)\n"
        "diamond: median, bar: its 95 % interval, over cells of network and learning rate",
        fontsize=10,
    )
    return figure


def _beside(values: pd.Series) -> pd.Series:
    """Vertical offsets around 0, so that dots of equal values do not cover each other."""
    equal = values.groupby(values)
    rank, num = equal.cumcount(), equal.transform("size")
    return (rank - (num - 1) / 2) * np.minimum(0.08, 0.8 / num)


def _one_run(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
    limits = {"loss": FAILURE} | THRESHOLDS
    rows = frame[frame["quantity"].isin(list(limits))]
    apart = ["black", *(COLORS[number] for number in (0, 1, 2, 8, 5, 4))]
    colors, markers = dict(zip(limits, apart, strict=True)), itertools.cycle("os^DvP<>X")
    for name, limit in limits.items():
        own = rows[(rows["quantity"] == name) & np.isfinite(rows["value"])].sort_values("step")
        label = "loss (failure)" if name == "loss" else WORDS[name]
        ax.plot(
            own["step"], own["value"] / limit, color=colors[name], marker=next(markers), markersize=4, linewidth=1.3,
            label=label,
        )  # fmt: skip
    ax.axhline(1, color="0.5", linewidth=0.8, zorder=0)
    ax.set(yscale="log", xlabel="step of training", ylabel="signal over its threshold", ylim=SHOWN)
    if len(rows):
        one = rows.iloc[0]
        run = f"{one['model']}, peak learning rate {one['lr']:g}, seed {one['seed']}"
        ax.set_title(f"One run, the last to fail: {run}\nvalues beyond {SHOWN[1]:g} are not shown", fontsize=10)
    ax.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    sns.despine(ax=ax)
    return figure


def _failures(runs: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    start = runs["log10_gsc_at_start"].groupby(level="model", observed=True).mean().sort_values()
    failed = np.isfinite(runs["failure_step"]).groupby(level=["model", "lr"], observed=True).mean().unstack("lr")
    sns.heatmap(
        100 * failed.loc[start.index], vmin=0, vmax=100, cmap="Greys", annot=True, fmt=".0f", ax=ax,
        cbar_kws={"label": "runs that fail in %"}, linewidths=0.5, linecolor="0.8",
    )  # fmt: skip
    ax.set_yticks(
        np.arange(len(start)) + 0.5,
        [f"{str(model).replace('_', '+')}\n{value:.1f}" for model, value in start.items()],
        rotation=0,
    )
    ax.set(xlabel="peak of the learning rate", ylabel="network, its mean largest\n" + r"$\log_{10}$ GSC at step 0")
    seeds = runs.index.get_level_values("seed").nunique()
    ax.set_title(f"Runs that fail, in % of {seeds} seeds", fontsize=10)
    return figure
