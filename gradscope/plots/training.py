"""How numbers of every layer move while a network learns; frames of `gradscope.Monitor` have a column ``step``."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gradscope.frames import to_last_target
from gradscope.plots.rows import DIVERGING, LABELS, finite_limits, num_runs, rows_of, spread_apart

STEP = "step of training"
MARKERS = "os^DvPX<>*"
NUM_MARKERS = 7  # along a curve, about; the last point has one
ZERO_COLOR = "black"  # in no color map here: the logarithm of zero is below every scale


def evolution(
    frame: pd.DataFrame,
    quantity: str = "gsc",
    *,
    limits: tuple[float, float] | None = None,
    colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """log10 of a quantity as a heat map, layers from the input (top) to the output against steps; mean over runs.

    Arguments:
        frame: Records of a monitor.
        quantity: "gsc" (to the last target), "gradient_norm", "weight_norm", ...
        limits: Ends of the color scale, so that panels can share one.  Default: symmetric about 0 for GSC.
        colorbar: Whether to draw one.

    Zeros, which have no logarithm, are black, and a legend says so.

    Raises:
        ValueError: No rows of that quantity, or none that is finite and not zero.
    """
    table = _table(frame, quantity)
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    values = table.to_numpy()
    low, high = limits or finite_limits(values, symmetric=quantity == "gsc")
    edges = _edges(table.columns.to_numpy(dtype=np.float64))
    colors = plt.get_cmap(DIVERGING if quantity == "gsc" else "viridis").with_extremes(under=ZERO_COLOR)
    # Only zeros are to be under the scale, so what the given limits leave out is put on its ends.
    inside = np.where(np.isneginf(values), low - 1.0, values.clip(low, high))
    shown = ax.pcolormesh(
        edges, np.arange(len(table) + 1), inside, cmap=colors, vmin=low, vmax=high, shading="flat"
    )  # fmt: skip
    if np.isneginf(values).any():
        ax.legend(handles=[Patch(color=ZERO_COLOR, label="zero")], frameon=True, fontsize=8, loc="lower left")
    ax.set_yticks(np.arange(len(table)) + 0.5, table.index, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel=STEP, ylabel="")
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, label=LABELS.get(quantity, rf"$\log_{{10}}$ {quantity.replace('_', ' ')}"))
    return ax


def before_after(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """log10 GSC of every layer to the last target at the first and at the last record; bands: deviation of runs.

    Means are those of the runs in which it is not zero; the legend counts the layers where it is zero in some run.
    """
    rows = to_last_target(rows_of(frame, "gsc"))
    steps = sorted(rows["step"].unique())
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    colors = sns.color_palette("colorblind")
    ends = dict(zip((steps[0], steps[-1]), ("before", "after"), strict=True))
    for color, (step, word) in zip(colors, ends.items(), strict=False):
        own = rows[rows["step"] == step]
        grouped = own.assign(log10_value=own["log10_value"].where(np.isfinite(own["log10_value"]))).groupby("index")
        mean, deviation = grouped["log10_value"].mean(), grouped["log10_value"].std().fillna(0.0)
        zeros = own.loc[np.isneginf(own["log10_value"]), "index"].nunique()
        rest = f"; zero in {zeros} of {len(mean)} layers" if zeros else ""
        ax.plot(mean.index, mean, color=color, marker="o", markersize=4, label=f"{word} (step {step}{rest})")
        if num_runs(rows) > 1:
            ax.fill_between(mean.index, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    names = rows.drop_duplicates("index").sort_values("index")
    ax.set_xticks(names["index"], names["layer"], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="", ylabel=LABELS["gsc"])
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return ax


def over_steps(frame: pd.DataFrame, quantity: str, *, ax: Axes | None = None) -> Axes:
    """A quantity of every layer against steps on a logarithmic axis, mean over runs of the logarithm.

    Layers are told apart by lightness, dark at the input, by markers, and by their names at the right end.  Where a
    number is zero, its line has a gap, and the name of the layer says so.

    Raises:
        ValueError: No rows of that quantity, or none that is finite and not zero.
    """
    table = _table(frame, quantity)
    logarithms = table.to_numpy()
    finite_limits(logarithms, symmetric=False)
    zero = {layer for layer, row in zip(table.index, logarithms, strict=True) if np.isneginf(row).any()}
    table = table.where(np.isfinite(logarithms)).dropna(how="all")
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    colors = sns.color_palette("viridis", len(table))
    last = float(table.columns[-1])
    step = max(1, len(table.columns) // NUM_MARKERS)
    for color, marker, (layer, values) in zip(colors, itertools.cycle(MARKERS), table.iterrows(), strict=False):
        # Of a line with gaps each point, or a number between two zeros would not be seen.
        places = 1 if layer in zero else ((len(values) - 1) % step, step)
        ax.plot(
            table.columns, 10.0**values, color=color, linewidth=1.4, marker=marker, markersize=5, markevery=places
        )  # fmt: skip
    ax.set_yscale("log")
    ends = table.ffill(axis=1).iloc[:, -1].to_numpy()
    low, high = np.log10(ax.get_ylim())
    heights = spread_apart(ends, gap=0.05 * (high - low))
    for color, layer, end, height in zip(colors, table.index, ends, heights, strict=True):
        name = f"{layer} (zero at times)" if layer in zero else str(layer)
        ax.annotate(
            name, (last, 10.0**end), xytext=(last * 1.04, 10.0**height), va="center", fontsize=8, color=color,
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6},
        )  # fmt: skip
    ax.set(xlabel=STEP, ylabel=quantity.replace("_", " "))
    sns.despine(ax=ax)
    return ax


def learning(metrics: pd.DataFrame, quantity: str, *, hue: str = "model", ax: Axes | None = None) -> Axes:
    """A number of the records of training against steps, mean over runs with bands of one standard deviation.

    ``metrics``: columns ``step``, ``quantity`` (null where it was not taken) and ``hue``.

    Raises:
        ValueError: No such column, or nothing in it.
    """
    if quantity not in metrics or metrics[quantity].isna().all():
        raise ValueError(f"The records of training have no {quantity!r}; their columns are {list(metrics.columns)}.")
    rows = metrics[metrics[quantity].notna()]
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    sparse = rows.groupby(hue, observed=True)["step"].nunique().max() <= 20
    sns.lineplot(
        rows, x="step", y=quantity, hue=hue, style=hue, errorbar="sd" if num_runs(rows) > 1 else None,
        palette="colorblind", markers=bool(sparse), ax=ax,
    )  # fmt: skip
    ax.set(xlabel=STEP, ylabel=quantity.replace("_", " "))
    ax.legend(frameon=False, fontsize=9, title=None)
    sns.despine(ax=ax)
    return ax


def _table(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Mean of log10 over runs: a row a layer in execution order, a column a step."""
    rows = rows_of(frame, quantity)
    rows = to_last_target(rows) if quantity == "gsc" else rows
    order = rows.drop_duplicates("layer").sort_values("index")["layer"]
    table = rows.pivot_table(index="layer", columns="step", values="log10_value", aggfunc="mean", observed=True)
    return table.reindex(index=order)


def _edges(steps: np.ndarray) -> np.ndarray:
    """Borders between the cells of neighboring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
