"""Figures of layers during training, from a `gradscope.Monitor` or its frames, which have a column ``step``."""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from gradscope.choices import Finite, checked, listed, require
from gradscope.plots.drawing import (
    DIVERGING,
    axes,
    curve,
    graded,
    ink,
    label_ends,
    legend,
    name_layers,
    next_colors,
    reference,
    short_names,
    whole_numbers,
)  # fmt: skip
from gradscope.plots.rows import (
    LABELS,
    RECORDED,
    curve_names,
    finite_limits,
    frame_of,
    growth_words,
    gsc_rows,
    hue_of,
    one_network,
    rows_of,
    summary,
)  # fmt: skip

STEP = "step of training"
MARKERS = "os^DvPX<>*"
NUM_MARKERS = 7  # a curve has about this many markers, one of them at the last point
MOST_DECADES = 200  # a logarithmic axis of matplotlib ends near the largest float; beyond, the logarithms are drawn
MAX_SPARSE = 20  # curves of at most this many points have markers
ZERO_COLOR, MISSING_COLOR = "black", "0.7"  # zero has no logarithm; neither color is in the color maps


@checked
def evolution(
    data: Any, quantity: str = "gsc", *, limits: tuple[Finite, Finite] | None = None, colorbar: bool = True,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with a heat map of log10 of a quantity during training: layers (input on top) against steps.

    Values are means over seeds.  Zeros are black and missing records are gray; a legend explains these two colors.

    Arguments:
        data: A `gradscope.Monitor`, its frame, or a list of these (networks that differ in their seeds).
        quantity: "gsc" (to the last target), "gradient_norm", "weight_norm", ...
        limits, colorbar, ax: As in `gradscope.plots.matrix`, but default limits are symmetric about 0 for GSC only.

    Raises:
        ValueError: The frame lacks a column or rows of that quantity, no value is finite and nonzero, or networks
            differ in more than their seeds.

    >>> frame = pd.DataFrame({"layer": list("abab"), "index": [1, 2, 1, 2], "step": [0, 0, 9, 9], "quantity": "loss"})
    >>> ax = evolution(frame.assign(log10_value=[0.0, -1.0, -2.0, -3.0]), "loss")
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['a', 'b']
    """
    rows = _records(data, quantity)
    order = _layers(rows)
    table = rows.pivot_table(index="layer", columns="step", values="log10_value", aggfunc="mean", observed=True)
    table = table.reindex(index=order)
    ax = axes(ax)
    values = table.to_numpy()
    low, high = limits or finite_limits(values, symmetric=quantity == "gsc")
    colors = plt.get_cmap(DIVERGING if quantity == "gsc" else None).with_extremes(under=ZERO_COLOR, bad=MISSING_COLOR)
    # Values outside the given limits are moved to the ends of the scale, so that only zeros lie below the scale.
    inside = np.where(np.isneginf(values), low - 1.0, values.clip(low, high))
    edges = _edges(table.columns.to_numpy(dtype=np.float64))
    shown = ax.pcolormesh(
        edges, np.arange(len(table) + 1), np.ma.masked_invalid(inside), cmap=colors, vmin=low, vmax=high
    )
    marked = ((ZERO_COLOR, "zero", np.isneginf(values)), (MISSING_COLOR, "not recorded", np.isnan(values)))
    if handles := [Patch(facecolor=c, edgecolor=ink(ax), label=word) for c, word, where in marked if where.any()]:
        ax.legend(handles=handles, loc="lower left", frameon=True)
    name_layers(ax.yaxis, np.arange(len(table)) + 0.5, order)
    ax.invert_yaxis()
    _step_axis(ax, table.columns)
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, label=LABELS.get(quantity, rf"$\log_{{10}}$ {quantity.replace('_', ' ')}"))
    return ax


@checked
def before_after(data: Any, *, ax: Axes | None = None) -> Axes:
    """Axes with log10 GSC of every layer with respect to the last target, at the first and at the last record.

    Lines are means over the seeds; a seed is left out at layers where its GSC is zero.  Bands reach one standard
    deviation between seeds to each side, or show the 95 % interval of a single seed.  The legend counts the layers
    where GSC is zero in at least one seed.

    Takes ``data`` and ``ax`` as `evolution` does, and raises the same exceptions.

    >>> frame = pd.DataFrame({"layer": list("abab"), "index": [1, 2, 1, 2], "depth_from_output": [1, 0, 1, 0]})
    >>> ax = before_after(frame.assign(quantity="gsc", step=[0, 0, 9, 9], log10_value=[1.0, 0.0, 0.5, 0.0]))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['before (step 0)', 'after (step 9)']
    """
    rows = _records(data, "gsc")
    order, steps = _layers(rows), sorted(rows["step"].unique())
    rows = rows.assign(_place=rows["layer"].map(dict(zip(order, range(len(order)), strict=True))).astype(int))
    new, ax = ax is None, axes(ax)
    words = {steps[0]: "before (step {})", steps[-1]: "after (step {})"} if len(steps) > 1 else {steps[0]: "step {}"}
    for style, (step, word) in zip(next_colors(ax, len(words)), words.items(), strict=True):
        points = summary(rows[rows["step"] == step], "_place", "log10_value")
        zeros, label = int((points["zeros"] > 0).sum()), word.format(step)
        label = label.replace(str(step), f"{step}; zero in {zeros} of {len(points)} layers") if zeros else label
        label = ": ".join(filter(None, (label, growth_words(rows[rows["step"] == step]))))
        curve(ax, points["_place"], points, **{**style, "marker": "o", "markersize": 4, "label": label})
    reference(ax, y=0)
    name_layers(ax.xaxis, range(len(order)), order, grow=new)
    ax.set(xlabel="", ylabel=LABELS[rows["quantity"].iloc[0]])
    legend(ax)
    return ax


@checked
def over_steps(data: Any, quantity: str, *, ax: Axes | None = None) -> Axes:
    """Axes with a quantity during training, one line per layer, on a logarithmic scale against steps.

    Lines are geometric means over seeds.  Bands are one standard deviation of log10 between seeds, or with one seed the
    95 % interval.  Colors run through the color map from the input to the output, and the name of a layer stands at the
    right end of its line.  If there are many layers, every n-th is named.  Where the quantity is zero, the line has a
    gap, and the name is followed by "(zero at times)".  For values beyond 1e200 or below 1e-200, the axis shows log10.

    Takes ``data`` and ``ax`` as `evolution` does, and raises the same exceptions.

    >>> frame = pd.DataFrame({"layer": list("abab"), "index": [1, 2, 1, 2], "step": [0, 0, 9, 9], "quantity": "loss"})
    >>> ax = over_steps(frame.assign(log10_value=[0.0, -1.0, -2.0, -3.0]), "loss")
    >>> [text.get_text() for text in ax.texts]
    ['a', 'b']
    """
    rows = _records(data, quantity)
    decades = max(np.abs(finite_limits(rows["log10_value"], symmetric=True)))
    parts = rows.groupby("layer", observed=True, sort=False)
    found = {layer: summary(parts.get_group(layer), "step", "log10_value") for layer in _layers(rows)}
    zero = {layer for layer, points in found.items() if points["zeros"].any()}
    found = {layer: points for layer, points in found.items() if points["mean"].notna().any()}
    ax = axes(ax)
    names, ends = dict(zip(found, short_names(list(found)), strict=True)), []
    for color, marker, (layer, points) in zip(
        graded(ax, len(found)), itertools.cycle(MARKERS), found.items(), strict=False
    ):
        if decades < MOST_DECADES:
            points[["mean", "low", "high"]] = 10.0 ** points[["mean", "low", "high"]]
        # In a line with gaps every point has a marker, so that a single number between two zeros is visible.
        step = max(1, len(points) // NUM_MARKERS)
        places = 1 if layer in zero else ((len(points) - 1) % step, step)
        shape: dict[str, Any] = {"marker": marker, "markersize": 5, "markevery": places}
        points["mean"] = points["mean"].mask(points["zeros"] > 0)
        curve(ax, points["step"], points, color=color, linewidth=1.4, linestyle="-", label=str(layer), **shape)
        last = points.dropna(subset="mean")
        if len(last):
            name = f"{names[layer]} (zero at times)" if layer in zero else names[layer]
            ends.append((name, float(last["step"].iloc[-1]), float(last["mean"].iloc[-1]), color))
    word = quantity.replace("_", " ")
    if decades < MOST_DECADES:
        ax.set(yscale="log", ylabel=word)
    else:
        ax.set_ylabel(rf"$\log_{{10}}$ {word}")
    label_ends(ax, ends)
    _step_axis(ax, sorted(rows["step"].unique()))
    return ax


@checked
def learning(metrics: Any, quantity: str, *, hue: str | None = None, ax: Axes | None = None) -> Axes:
    """Axes with a training metric against steps: the mean over seeds, with bands of one standard deviation.

    Arguments:
        metrics: A frame, or a dict from names of networks to frames.  A frame has the columns ``step``, the one that
            ``quantity`` names (NaN at steps without a value), and the one that ``hue`` names.
        quantity: The metric, such as "train_loss".
        hue: The column that determines the color; by default the text column whose values vary, such as ``model``.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: A column is missing, the column that ``quantity`` names is empty, or a curve has two values for
            the same step and seed.

    >>> metrics = pd.DataFrame({"step": [1, 2], "train_loss": [2.0, 1.0], "model": "tanh"})
    >>> learning(metrics, "train_loss").get_ylabel()
    'train loss'
    """
    metrics = frame_of(metrics)
    require(metrics, ["step", quantity, *([hue] if hue is not None else [])], "metrics of training with these columns")
    if metrics[quantity].isna().all():
        raise ValueError(f"metrics has no values of {quantity!r}; its columns are {list(metrics.columns)}.")
    rows = metrics[metrics[quantity].notna()]
    if hue is None:
        words = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
        hue = hue_of(rows[[*words, *rows.columns.intersection(["seed"])]], None)
    own = [name for name in ("step", "seed", hue) if name in rows]
    if (twice := rows.duplicated(own, keep=False)).any():
        differ = [name for name in rows if name not in own and rows.loc[twice, name].nunique(dropna=False) > 1]
        raise ValueError(
            f"A curve has several values at step {rows.loc[twice, 'step'].iloc[0]} of one seed, which differ in "
            f"{listed(differ)}: name the column that distinguishes the runs as hue=, or draw one of them."
        )
    ax = axes(ax)
    parts = curve_names(hue, None, rows)
    for number, (style, (name, part)) in enumerate(zip(next_colors(ax, len(parts)), parts.items(), strict=True)):
        points = summary(part, "step", quantity)
        sparse = {"marker": MARKERS[number % len(MARKERS)], "markersize": 5} if len(points) <= MAX_SPARSE else {}
        curve(ax, points["step"], points, **{**style, "label": name[0] if name else None, **sparse})
    _step_axis(ax, sorted(rows["step"].unique()))
    ax.set_ylabel(quantity.replace("_", " "))
    if hue:
        legend(ax)
    return ax


def _records(data: Any, quantity: str) -> pd.DataFrame:
    """The rows of one quantity (for GSC, to the last target) of networks that differ in their seeds only."""
    if quantity == "gsc":
        rows = gsc_rows(data, "step", maker=RECORDED)
    else:
        rows = rows_of(data, quantity, "step", "log10_value", maker=RECORDED)
    one_network(rows, free=("step",))
    return rows


def _layers(rows: pd.DataFrame) -> list[str]:
    """Names of layers in execution order."""
    return rows.drop_duplicates("layer").sort_values("index", kind="stable")["layer"].tolist()


def _step_axis(ax: Axes, steps: Any) -> None:
    """Name the axis of steps, with ticks at whole steps; a single step has the only tick."""
    ax.xaxis.set_major_locator(whole_numbers())
    if len(steps) == 1:
        ax.set_xticks(list(steps))
    ax.set_xlabel(STEP)


def _edges(steps: np.ndarray) -> np.ndarray:
    """The borders between the cells of neighboring steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])
