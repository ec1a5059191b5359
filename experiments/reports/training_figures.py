"""Figures of trained networks: one panel per network, on one scale per figure."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from experiments.reports.sweep_figures import panels
from gradscope import plots
from gradscope.plots.rows import finite_limits


def draw(frame: pd.DataFrame, metrics: pd.DataFrame, title: str) -> dict[str, Figure]:
    """Figures per ``network``: loss and accuracy, GSC during training, GSC before and after, gradient norms."""
    seeds = frame["seed"].nunique()
    spread = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    band = f"{spread}, band: one standard deviation" if seeds > 1 else spread
    return {
        "learning": _learning(metrics, f"{title}\n{band}"),
        "gsc_over_training": _heat_maps(frame, f"{title}; GSC of each layer to the logits, {spread}"),
        "gsc_before_after": _panels(frame, plots.before_after, f"{title}; {band}", sharey=True),
        "gradient_norms": _panels(
            frame, lambda rows, ax: plots.over_steps(rows, "gradient_norm", ax=ax),
            f"{title}; gradient of each layer's parameters, {spread}{' of its logarithm' if seeds > 1 else ''}",
        ),
    }  # fmt: skip


def _learning(metrics: pd.DataFrame, title: str) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.0), layout="constrained")
    plots.learning(metrics, "train_loss", hue="network", ax=left)
    left.set_ylabel("training loss (mean since the last record)")
    right.set_ylabel("test accuracy")
    figure.suptitle(title, fontsize=10)
    tested = metrics[metrics["test_accuracy"].notna()] if "test_accuracy" in metrics else metrics[:0]
    if tested.empty:
        right.text(0.5, 0.5, "no run came to its first test", ha="center", transform=right.transAxes)
        return figure
    plots.learning(metrics, "test_accuracy", hue="network", ax=right)
    right.set_ylabel("test accuracy")
    final = tested.groupby(["network", "seed"], observed=True)["test_accuracy"].last()
    reached = 100 * final.groupby("network", observed=True).mean()
    for text in right.get_legend().get_texts():
        text.set_text(f"{text.get_text()}: {reached[text.get_text()]:.2f} %")
    return figure


def _panels(frame: pd.DataFrame, draw_one: Callable[..., Axes], title: str, *, sharey: bool = False) -> Figure:
    networks = list(frame["network"].unique())
    figure, axes = panels(len(networks), 3, 5.6, 4.4, sharey=sharey)
    for ax, network in zip(axes, networks, strict=True):
        try:
            draw_one(frame[frame["network"] == network], ax=ax)
        except ValueError as error:  # a dead or diverged network; still draw the others
            ax.text(0.5, 0.5, str(error), ha="center", wrap=True, fontsize=8, transform=ax.transAxes)
        ax.set_title(network, fontsize=10)
    figure.suptitle(title, fontsize=10)
    return figure


def _heat_maps(frame: pd.DataFrame, title: str) -> Figure:
    limits = finite_limits(frame.loc[frame["quantity"] == "gsc", "log10_value"], symmetric=True)
    figure = _panels(frame, lambda rows, ax: plots.evolution(rows, "gsc", limits=limits, colorbar=False, ax=ax), title)
    colors = ScalarMappable(Normalize(*limits), cmap=plots.DIVERGING)
    figure.colorbar(colors, ax=figure.axes, label=plots.LABELS["gsc"], shrink=0.8)
    return figure
