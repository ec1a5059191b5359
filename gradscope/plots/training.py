"""Figures of layers during training, from frames of `gradscope.Monitor`, which have a column ``step``."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gradscope.frames import to_last_target
from gradscope.plots.rows import DIVERGING, LABELS, axes, finite_limits, name_layers, num_runs, rows_of, spread_apart

STEP = "step of training"
MARKERS = "os^DvPX<>*"
NUM_MARKERS = 7  # a curve has about this many markers, one of them at the last point
ZERO_COLOR = "black"  # zero has no logarithm, and black is in none of the color maps


def evolution(
    frame: pd.DataFrame, quantity: str = "gsc", *, limits: tuple[float, float] | None = None, colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with a heat map of a quantity's log10, averaged over runs: layers from input (top) to output, against steps.

    Zeros are black, and a legend says so.

    Arguments:
        frame: Records of a monitor.
        quantity: "gsc" (to the last target), "gradient_norm", "weight_norm", ...
        limits, colorbar, ax: As in `gradscope.plots.matrix`; by default, limits are symmetric only for GSC.

    Raises:
        ValueError: The frame has no rows of that quantity, or all of them are zero or not finite.

    >>> frame = pd.DataFrame({"layer": list("abab"), "index": [1, 2, 1, 2], "step": [0, 0, 9, 9], "quantity": "loss"})
    >>> ax = evolution(frame.assign(log10_value=[0.0, -1.0, -2.0, -3.0]), "loss")
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['a', 'b']
    """
    table = _table(frame, quantity)
    ax = axes(ax)
    values = table.to_numpy()
    low, high = limits or finite_limits(values, symmetric=quantity == "gsc")
    colors = plt.get_cmap(DIVERGING if quantity == "gsc" else "viridis").with_extremes(under=ZERO_COLOR)
    # Values outside the given limits are moved to the ends of the scale, so that only zeros lie below the scale.
    inside = np.where(np.isneginf(values), low - 1.0, values.clip(low, high))
    edges = _edges(table.columns.to_numpy(dtype=np.float64))
    shown = ax.pcolormesh(edges, np.arange(len(table) + 1), inside, cmap=colors, vmin=low, vmax=high)
    if np.isneginf(values).any():
        ax.legend(handles=[Patch(color=ZERO_COLOR, label="zero")], frameon=True, fontsize=8, loc="lower left")
    ax.set_yticks(np.arange(len(table)) + 0.5, table.index, fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel=STEP, ylabel="")
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, label=LABELS.get(quantity, rf"$\log_{{10}}$ {quantity.replace('_', ' ')}"))
    return ax


def before_after(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Axes with log10 GSC of every layer to the last target, at the first and at the last record.

    At each layer, the line is the mean over the runs in which GSC is not zero, and the band is one standard deviation.
    The legend counts the layers where GSC is zero in at least one run.

    >>> frame = pd.DataFrame({"layer": list("abab"), "index": [1, 2, 1, 2], "depth_from_output": [1, 0, 1, 0]})
    >>> ax = before_after(frame.assign(quantity="gsc", step=[0, 0, 9, 9], log10_value=[1.0, 0.0, 0.5, 0.0]))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['before (step 0)', 'after (step 9)']
    """
    rows = to_last_target(rows_of(frame, "gsc"))
    steps = sorted(rows["step"].unique())
    ax = axes(ax)
    colors = sns.color_palette("colorblind")
    ends = dict(zip((steps[0], steps[-1]), ("before", "after"), strict=True))
    for color, (step, word) in zip(colors, ends.items(), strict=False):
        own = rows[rows["step"] == step].set_index("index")["log10_value"]
        grouped = own.where(np.isfinite(own)).groupby("index")
        mean, deviation = grouped.mean(), grouped.std().fillna(0.0)
        zeros = own.index[np.isneginf(own)].nunique()
        rest = f"; zero in {zeros} of {len(mean)} layers" if zeros else ""
        ax.plot(mean.index, mean, color=color, marker="o", markersize=4, label=f"{word} (step {step}{rest})")
        if num_runs(rows) > 1:
            ax.fill_between(mean.index, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
    name_layers(ax, rows, fontsize=8)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return ax


def over_steps(frame: pd.DataFrame, quantity: str, *, ax: Axes | None = None) -> Axes:
    """Axes with one line per layer: the geometric mean of a quantity over runs, on a logarithmic scale, against steps.

    Each layer has its own color (dark at the input) and a marker, and its name stands at the right end.  Where the
    quantity is zero, the line has a gap; the name is then followed by "(zero at times)".

    Raises:
        ValueError: The frame has no rows of that quantity, or all of them are zero or not finite.

    >>> frame = pd.DataFrame({"layer": list("abab"), "index": [1, 2, 1, 2], "step": [0, 0, 9, 9], "quantity": "loss"})
    >>> ax = over_steps(frame.assign(log10_value=[0.0, -1.0, -2.0, -3.0]), "loss")
    >>> [text.get_text() for text in ax.texts]
    ['a', 'b']
    """
    table = _table(frame, quantity)
    logarithms = table.to_numpy()
    finite_limits(logarithms, symmetric=False)
    zero = {layer for layer, row in zip(table.index, logarithms, strict=True) if np.isneginf(row).any()}
    table = table.where(np.isfinite(logarithms)).dropna(how="all")
    ax = axes(ax)
    colors = sns.color_palette("viridis", len(table))
    last = float(table.columns[-1])
    step = max(1, len(table.columns) // NUM_MARKERS)
    for color, marker, (layer, values) in zip(colors, itertools.cycle(MARKERS), table.iterrows(), strict=False):
        # In a line with gaps every point has a marker, so that a single number between two zeros is visible.
        places = 1 if layer in zero else ((len(values) - 1) % step, step)
        shape: dict[str, Any] = {"marker": marker, "markersize": 5, "markevery": places}
        ax.plot(table.columns, 10.0**values, color=color, linewidth=1.4, **shape)
    ax.set_yscale("log")
    ends = table.ffill(axis=1).iloc[:, -1].to_numpy()
    heights = spread_apart(ends, gap=0.05 * float(np.diff(np.log10(ax.get_ylim()))[0]))
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
    """Axes with a training metric against steps: the mean over runs, with bands of one standard deviation.

    ``metrics`` has the column ``step`` and the columns named by ``quantity`` (null if not recorded) and by ``hue``.

    Raises:
        ValueError: The column named by ``quantity`` is missing or contains only nulls.

    >>> metrics = pd.DataFrame({"step": [1, 2], "train_loss": [2.0, 1.0], "model": "tanh"})
    >>> learning(metrics, "train_loss").get_ylabel()
    'train loss'
    """
    if quantity not in metrics or metrics[quantity].isna().all():
        raise ValueError(f"metrics has no values of {quantity!r}; its columns are {list(metrics.columns)}.")
    rows = metrics[metrics[quantity].notna()]
    ax = axes(ax)
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
    """Mean of log10 over runs, with one row per layer in execution order and one column per step."""
    rows = rows_of(frame, quantity)
    rows = to_last_target(rows) if quantity == "gsc" else rows
    order = rows.drop_duplicates("layer").sort_values("index")["layer"]
    table = rows.pivot_table(index="layer", columns="step", values="log10_value", aggfunc="mean", observed=True)
    return table.reindex(index=order)


def _edges(steps: np.ndarray) -> np.ndarray:
    """The borders between the cells of neighboring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
