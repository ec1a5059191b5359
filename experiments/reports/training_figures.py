"""Figures of trained networks: one panel per network.  All panels of a figure have the same scale."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from experiments.reports import grids, sweep_figures
from experiments.reports.roles import assign
from gradscope import plots
from gradscope.plots.rows import finite_limits

panels = partial(sweep_figures.panels, in_a_row=3, size=(5.6, 4.4))


def draw(frame: pd.DataFrame, metrics: pd.DataFrame, title: str, keys: Sequence[str] = ()) -> dict[str, Figure]:
    """Figures per ``network``: loss and accuracy, GSC during training, before and after it, gradient norms.

    For many networks, loss and accuracy are drawn in panels, arranged by the ``keys`` of the sweep.
    """
    seeds = frame["seed"].nunique()
    spread = f"mean over {seeds} seeds" if seeds > 1 else "one seed"
    band = f"{spread}, band: one standard deviation" if seeds > 1 else spread
    learning: dict[str, Figure] = {}
    if keys and metrics["network"].nunique() > plots.MAX_DIRECT_LABELS:
        for quantity in ("train_loss", "test_accuracy"):
            if len(known := metrics[metrics[quantity].notna()] if quantity in metrics else metrics[:0]):
                learning |= grids.curves(known, quantity, assign(known, keys), title, "step")
    else:
        learning = {"learning": _learning(metrics, f"{title}\n{band}")}
    return learning | {
        "gsc_over_training": _heat_maps(frame, f"{title}; GSC of each layer to the logits, {spread}"),
        "gsc_before_after": panels(frame, plots.before_after, f"{title}; {band}", sharey=True),
        "gradient_norms": panels(
            frame, partial(plots.over_steps, quantity="gradient_norm"),
            f"{title}; gradient norm of each layer's parameters, {band.replace('mean', 'geometric mean')}",
            sharey=True,
        ),
    }  # fmt: skip


def _learning(metrics: pd.DataFrame, title: str) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.0), layout="constrained")
    plots.learning(metrics, "train_loss", hue="network", ax=left)
    left.set_ylabel("training loss (mean since the last record)")
    figure.suptitle(title, fontsize=10)
    tested = metrics[metrics["test_accuracy"].notna()] if "test_accuracy" in metrics else metrics[:0]
    if tested.empty:
        right.text(0.5, 0.5, "no run reached its first test", ha="center", transform=right.transAxes)
    else:
        plots.learning(metrics, "test_accuracy", hue="network", ax=right)
        final = tested.groupby(["network", "seed"], observed=True)["test_accuracy"].last()
        reached = 100 * final.groupby("network", observed=True).mean()
        for text in right.get_legend().get_texts():
            text.set_text(f"{text.get_text()}: {reached[text.get_text()]:.2f} %")
    right.set_ylabel("test accuracy")
    return figure


def _heat_maps(frame: pd.DataFrame, title: str) -> Figure:
    limits = finite_limits(frame.loc[frame["quantity"] == "gsc", "log10_value"], symmetric=True)
    figure = panels(frame, partial(plots.evolution, quantity="gsc", limits=limits, colorbar=False), title)
    sweep_figures.add_colorbar(figure, *limits, shrink=0.8)
    return figure
