"""Figures of the study transformer_training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.evidence import alarm_figures
from experiments.evidence.alarms import Alarms
from experiments.evidence.colors import ordered
from experiments.studies.transformer_training import signals
from experiments.studies.transformer_training.signals import EVERY, FAILURE, WORDS

CELLS = "step size and QK norm"
LABELS = {
    "loss": "loss in nats",
    "gradient": "norm of the gradient",
    "attention_logit": "largest attention logit",
    "least_entropy": "least entropy of a head, relative",
    "weight_growth": "largest growth of weights",
    "log10_gsc": "log10 GSC of the embedding",
}
LEAST = 1e-6  # smaller entropies are drawn here


def draw(alarms: Alarms, frame: pd.DataFrame) -> dict[str, Figure]:
    """Figures of leads, of warnings and false alarms, of changes in training, and of the runs that fail."""
    return {
        "leads": _leads(alarms),
        "warnings": alarm_figures.warnings(alarms, WORDS, CELLS),
        "moving": _moving(frame),
        "failures": _failures(alarms.table),
    }


def _leads(alarms: Alarms) -> Figure:
    figure, ax = plt.subplots(figsize=(7.4, 4.4), layout="constrained")
    alarm_figures.lead_dots(ax, alarms, WORDS)
    ax.set_xlabel("steps from the warning to the failure")
    ax.set_title("One dot per warned run; diamond: median; bar: 95 % interval", fontsize=10)
    return figure


def _moving(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(2, 3, figsize=(11.4, 6.4), layout="constrained", sharex=True)
    for ax, (name, label) in zip(axes.flat, LABELS.items(), strict=True):
        table = signals.moving(frame, name)
        rates = sorted(table.index.get_level_values("lr").unique())
        for color, rate in zip(ordered(len(rates)), rates, strict=True):
            for qk, style in ((False, "-"), (True, "--")):
                middle = table.loc[qk, rate].median()
                drawn = middle.clip(lower=LEAST) if name == "least_entropy" else middle
                words = f"{rate:g}{', QK norm' if qk else ''}"
                ax.plot(drawn.index, drawn, style, color=color, linewidth=1.4, label=words)
        if not name.startswith("log10"):
            ax.set_yscale("log")
        if name == "loss":
            ax.axhline(FAILURE, color="0.6", linewidth=0.8)
        ax.set_title(label, fontsize=10)
        sns.despine(ax=ax)
    for ax in axes[-1]:
        ax.set_xlabel("step of training")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="peak step size")
    seeds = frame["seed"].nunique()
    figure.suptitle(f"Medians over {seeds} seeds, every {EVERY}rd step; gray: limit of a failure", fontsize=11)
    return figure


def _failures(runs: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.8, 2.8), layout="constrained")
    failed = np.isfinite(runs["failure_step"]).groupby(level=signals.CELL, observed=True).mean().unstack("lr")
    sns.heatmap(
        100 * failed.rename({False: "without", True: "with"}), vmin=0, vmax=100, cmap="Greys", annot=True, fmt=".0f",
        ax=ax, cbar_kws={"label": "runs that fail in %"}, linewidths=0.5, linecolor="0.8",
    )  # fmt: skip
    ax.set(xlabel="peak of the step size", ylabel="QK norm")
    seeds = runs.index.get_level_values("seed").nunique()
    ax.set_title(f"Runs that fail, in % of {seeds} seeds", fontsize=10)
    return figure
