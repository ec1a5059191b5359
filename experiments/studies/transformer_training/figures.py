"""Figures of the study transformer_training."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
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
    "log10_gsc": r"$\log_{10}$ GSC of the embedding",
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
    figure, axes = plt.subplots(4, 3, figsize=(10.4, 10.4), layout="constrained", sharex=True)
    for place, (name, label) in enumerate(LABELS.items()):
        row, column = 2 * (place // 3), place % 3
        table = signals.moving(frame, name)
        axes[row + 1, column].sharey(axes[row, column])
        for qk, ax in enumerate(axes[row : row + 2, column]):
            rows = table[table.index.get_level_values("qk_norm") == bool(qk)]
            _curves(ax, rows, LEAST if name == "least_entropy" else None)
            if not name.startswith("log10"):
                ax.set_yscale("log")
            if name == "loss":
                ax.axhline(FAILURE, color="0.6", linewidth=0.8)
        axes[row, column].set_title(label, fontsize=10)
    for number, ax in enumerate(axes[:, 0]):
        ax.set_ylabel("with QK norm" if number % 2 else "without QK norm")
    for ax in axes[-1]:
        ax.set_xlabel("step of training")
    sns.despine(figure)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, title="peak step size")
    words = f"median over {frame['seed'].nunique()} seeds, band: from the lowest to the highest"
    figure.suptitle(f"Every {EVERY}rd step; {words}; gray line: limit of a failure", fontsize=11)
    return figure


def _curves(ax: Axes, table: pd.DataFrame, least: float | None) -> None:
    """The median over seeds and the range of one quantity, for each peak step size, not below ``least``."""
    rates = sorted(table.index.get_level_values("lr").unique())
    for color, rate in zip(ordered(len(rates)), rates, strict=True):
        runs = table[table.index.get_level_values("lr") == rate].clip(lower=least)
        ax.plot(runs.columns, runs.median(), color=color, linewidth=1.4, label=f"{rate:g}")
        ax.fill_between(runs.columns, runs.min(), runs.max(), color=color, alpha=0.2, linewidth=0)


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
