"""Figures of the study exploding_symptoms."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.evidence import alarm_figures
from experiments.evidence.colors import COLORS
from experiments.studies.exploding_symptoms.alarms import Alarms
from experiments.studies.exploding_symptoms.signals import FAILURE, THRESHOLDS, WORDS, leads

# Limits of the axis of signals divided by thresholds. On an axis with the exploding loss, other curves look flat.
SHOWN = (1e-7, 1e4)


def draw(alarms: Alarms, frame: pd.DataFrame) -> dict[str, Figure]:
    """All figures. The frame contains all steps of one run."""
    return {
        "warnings": alarm_figures.warnings(alarms, WORDS, "network and learning rate"),
        "leads": _leads(alarms),
        "one_run": _one_run(frame),
        "failures": _failures(alarms.table),
    }


def _leads(alarms: Alarms) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(10.0, 4.2), layout="constrained", sharex=True, sharey=True)
    ends = {"failure_step": "the failure", "nan_step": "a loss that is not finite"}
    longest = max(float(np.nan_to_num(leads(alarms.table, end).to_numpy()).max(initial=1.0)) for end in ends)
    for ax, (end, words) in zip(axes, ends.items(), strict=True):
        alarm_figures.lead_dots(ax, alarms, WORDS, end)
        ax.set(xlabel=f"steps between the warning and {words}", xlim=(0, 1.35 * longest))
    figure.suptitle(
        "One dot per warned run: of all runs that fail (left), of runs that reach a loss that is not finite (right)\n"
        "diamond: median, bar: its 95 % interval, over cells of network and learning rate",
        fontsize=10,
    )
    return figure


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
