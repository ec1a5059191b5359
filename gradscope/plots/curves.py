"""Curves of coefficients and statistics against depth, and growth rates of networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradscope.frames import to_last_target
from gradscope.plots.rows import LABELS, axes, name_layers, num_runs, rows_of, spread_apart

MAX_DIRECT_LABELS = 8
LABEL_HEIGHT = 0.047  # as a fraction of the axis
MARKERS = "os^Dv"
NUM_MARKERS = 12  # a predicted curve has about this many markers
# Color and marker of each verdict; the markers distinguish verdicts without color.
VERDICTS = {"exploding": (3, "^"), "vanishing": (0, "v"), "stable": (2, "o"), "undecided": (7, "s")}
OTHER = (7, "D")


def profile(
    frame: pd.DataFrame, *, hue: str | None = None, style: str | None = None,
    notes: Mapping[tuple[str, ...], str] | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with log10 GSC from every layer to the last target, against the number of layers between the two.

    Lines are means over the runs with the same hue and style; bands are one standard deviation between these runs.

    Arguments:
        frame: Tidy frame; its rows of quantity "gsc" for the last target of each run are drawn.
        hue, style: Columns that determine the color and the dashes of a curve.
        notes: Texts to add to the labels of curves, such as verdicts; the keys are a curve's values of hue and style.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: The frame has no rows of quantity "gsc".

    >>> import torch, gradscope as gs
    >>> measured = gs.gsc(gs.models.MLP(depth=3, width=8), torch.randn(16, 8))
    >>> profile(measured.to_frame()).get_xlabel()
    'layers between $f_k$ and the target'
    """
    rows = to_last_target(rows_of(frame, "gsc"))
    ax = _curves(rows, "depth_from_output", "log10_value", hue, style, ax, notes=notes)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel=LABELS["depth_from_output"], ylabel=LABELS["gsc"])
    return ax


def named_profile(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Axes with log10 GSC to the last target, against named layers in execution order; for networks of few layers.

    Bands are one standard deviation between runs.  For a single run, error bars are the sampling error over the batch.

    >>> import torch, gradscope as gs
    >>> measured = gs.gsc(gs.models.MLP(depth=2, width=8), torch.randn(16, 8))
    >>> [label.get_text() for label in named_profile(measured.to_frame()).get_xticklabels()]
    ['input', 'layers.0', 'layers.1']
    """
    rows = to_last_target(rows_of(frame, "gsc"))
    ax = _curves(rows, "index", "log10_value", None, None, ax, marker="o")
    name_layers(ax, rows)
    if num_runs(rows) == 1:
        ax.errorbar(rows["index"], rows["log10_value"], rows["log10_stderr_sample"].fillna(0), fmt="none", color="0.4")
    return ax


def theory(predicted: pd.DataFrame, keys: Sequence[str], *, ax: Axes, hue_order: Sequence[object] = ()) -> Axes:
    """The Axes of `profile`, with thin lines and markers of predicted log10 GSC added in the network's color.

    Arguments:
        predicted: Columns ``depth_from_output``, ``log10_value`` and the keys; one line per combination of keys.
        keys: The column that determines the color and, optionally, one that determines the shape of the markers.
        hue_order: All values of the first key in the order of `profile`; by default those of ``predicted``.

    >>> predicted = pd.DataFrame({"depth_from_output": [0, 1], "log10_value": [0.0, 0.2], "activation": "tanh"})
    >>> ax = theory(predicted, ["activation"], ax=axes(None))
    >>> ax.get_legend().get_texts()[0].get_text()
    'mean field'
    """
    order = list(hue_order) or list(predicted[keys[0]].unique())
    colors = dict(zip(order, sns.color_palette("colorblind", len(order)), strict=True))
    shapes: dict[str, str] = {}
    thin: dict[str, Any] = {"linewidth": 0.6, "markersize": 5, "markerfacecolor": "none"}
    for _, rows in predicted.groupby(list(keys), sort=False, observed=True):
        style = str(rows[keys[1]].iloc[0]) if keys[1:] else "none"
        label = "mean field" if style == "none" else f"mean field, {style}"
        ax.plot(
            rows["depth_from_output"], rows["log10_value"], color=colors[rows[keys[0]].iloc[0]],
            marker=shapes.setdefault(label, MARKERS[len(shapes) % len(MARKERS)]),
            markevery=max(1, len(rows) // NUM_MARKERS), zorder=1.5, label=label, **thin,
        )  # fmt: skip
    handles = [Line2D([], [], color="0.3", marker=shape, label=label, **thin) for label, shape in shapes.items()]
    ax.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    return ax


def convergence(frame: pd.DataFrame, *, hue: str, ax: Axes | None = None) -> Axes:
    """Axes with measured rates and 95 % intervals against 1 / width, and theory as a star at infinite width.

    ``frame`` has one row per network, with columns ``width``, ``rate``, ``rate_low``, ``rate_high``, ``theory`` and the
    column ``hue``, which determines the color.

    >>> rates = {"rate": 1.2, "rate_low": 1.1, "rate_high": 1.3, "theory": 1.25}
    >>> convergence(pd.DataFrame({"width": [50, 100], "norm": "layer", **rates}), hue="norm").texts[0].get_text()
    'layer: theory 1.2500'
    """
    ax = axes(ax)
    colors = sns.color_palette("colorblind")
    for color, (name, rows) in zip(colors, frame.groupby(hue, sort=False, observed=True), strict=False):
        rows, limit = rows.sort_values("width"), float(rows["theory"].iloc[0])
        inverse, spread = 1 / rows["width"].astype(float), _error_bars(rows)
        ax.errorbar(inverse, rows["rate"], yerr=spread, fmt="o-", color=color, linewidth=1, markersize=4, capsize=2)
        ax.axhline(limit, color=color, linewidth=0.8, linestyle=(0, (4, 2.5)))
        ax.plot(0, limit, marker="*", markersize=12, color=color, clip_on=False, zorder=5)
        ax.annotate(
            f"{name}: theory {limit:.4f}", (0, limit), xytext=(8, 6), textcoords="offset points", color=color,
            fontsize=9,
        )  # fmt: skip
    widths = sorted(frame["width"].unique(), reverse=True)
    ticks = [0, *(1 / float(width) for width in widths)]
    ax.set_xticks(ticks, [r"$\infty$", *map(str, widths)], rotation=60, fontsize=8)
    ax.set(xlabel="width (linear in 1 / width)", ylabel="GSC rate per layer (squared convention)")
    sns.despine(ax=ax)
    return ax


def statistic(
    frame: pd.DataFrame, quantity: str, *, log10: bool = False, hue: str | None = None, style: str | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with a statistic of each layer, such as "sign_diversity", against the layer's index from the input.

    Arguments and errors are those of `profile`.  With ``log10``, the logarithm is drawn wherever it is finite.

    >>> import torch, gradscope as gs
    >>> frame = gs.measure(gs.models.MLP(depth=3, width=8), torch.randn(16, 8))
    >>> statistic(frame, "sign_diversity").get_ylabel()
    'sign diversity'
    """
    rows, label = rows_of(frame, quantity), LABELS.get(quantity, quantity)
    if log10:
        rows = rows[np.isfinite(rows["log10_value"])]
    ax = _curves(rows, "index", "log10_value" if log10 else "value", hue, style, ax)
    ax.set(xlabel=LABELS["index"], ylabel=rf"$\log_{{10}}$ {label}" if log10 else label)
    if not log10:
        ax.set_ylim(bottom=0)
    return ax


def rates(growth: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Axes with the growth rate of each network, its 95 % interval and its verdict.

    Crosses show theory.  The vertical line marks rate 1, where coefficients neither grow nor shrink.  ``growth`` has
    one row per network, from top to bottom.  Its columns are ``network``, ``theory`` (may be null), and ``rate``,
    ``rate_low``, ``rate_high`` and ``verdict`` as in `gradscope.Growth`.

    >>> growth = {"rate": [1.2], "rate_low": [1.1], "rate_high": [1.3], "verdict": ["exploding"], "theory": [1.25]}
    >>> ax = rates(pd.DataFrame({"network": ["tanh"], **growth}))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['theory', 'exploding']
    """
    ax = axes(ax, (7.0, 1.2 + 0.22 * len(growth)))
    colors = sns.color_palette("colorblind")
    ax.axvline(1.0, color="0.6", linewidth=0.8, zorder=0)
    growth = growth.reset_index(drop=True)
    for verdict, rows in growth.groupby("verdict", sort=False, observed=True):
        color, marker = VERDICTS.get(str(verdict), OTHER)
        ax.errorbar(
            rows["rate"], rows.index, xerr=_error_bars(rows), fmt=marker, color=colors[color], linewidth=1.2,
            markersize=5, capsize=2, label=str(verdict),
        )  # fmt: skip
    if growth["theory"].notna().any():
        ax.plot(growth["theory"], growth.index, "x", color="black", markersize=6, markeredgewidth=1.2, label="theory")
    ax.set_yticks(range(len(growth)), growth["network"], fontsize=8)
    ax.set(ylim=(len(growth) - 0.5, -0.5), xlabel="GSC rate per layer (squared convention)")
    ax.grid(axis="y", color="0.93", zorder=-1)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return ax


def _error_bars(rows: pd.DataFrame) -> list[pd.Series]:
    """Distances from each rate to the lower and to the upper end of its interval."""
    return [(rows["rate"] - rows["rate_low"]).clip(lower=0), (rows["rate_high"] - rows["rate"]).clip(lower=0)]


def _curves(
    rows: pd.DataFrame, x: str, y: str, hue: str | None, style: str | None, ax: Axes | None,
    marker: str | None = None, notes: Mapping[tuple[str, ...], str] | None = None,
) -> Axes:  # fmt: skip
    """Axes with mean lines and bands of one standard deviation; if there are few lines, each is labeled at its end."""
    ax = axes(ax)
    sns.lineplot(
        rows, x=x, y=y, hue=hue, style=style, errorbar="sd" if num_runs(rows) > 1 else None, linewidth=1.8, ax=ax,
        palette="colorblind" if hue else None, color=None if hue else sns.color_palette("colorblind")[0], marker=marker,
    )  # fmt: skip
    sns.despine(ax=ax)
    legend, keys = ax.get_legend(), [key for key in (hue, style) if key is not None]
    if legend is None:
        return ax
    curves = {tuple(map(str, key)): part for key, part in rows.groupby(keys, observed=True, sort=False)}
    if 1 < len(curves) <= MAX_DIRECT_LABELS:
        handles = zip(legend.get_texts(), legend.legend_handles, strict=True)
        colors = {text.get_text(): handle.get_color() for text, handle in handles if isinstance(handle, Line2D)}
        _label_ends(ax, curves, x, y, notes or {}, colors)
        legend.remove()
    return ax


def _label_ends(
    ax: Axes, curves: Mapping[tuple[str, ...], pd.DataFrame], x: str, y: str,
    notes: Mapping[tuple[str, ...], str], colors: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write each curve's name at its right end, without overlaps."""
    ends = {}
    for name, rows in curves.items():
        last = float(rows[x].max())
        ends[name] = last, float(rows.loc[rows[x] == last, y].mean())
    low, high = ax.get_ylim()
    heights = spread_apart([end for _, end in ends.values()], gap=(high - low) * LABEL_HEIGHT)
    right = max(last for last, _ in ends.values())
    for (name, end), height in zip(ends.items(), heights, strict=True):
        color, note = colors.get(name[0], "0.2"), f": {notes[name]}" if name in notes else ""
        ax.annotate(
            "+".join(part for part in name if part != "none") + note, end, xytext=(right * 1.03, height), va="center",
            fontsize=9, color=color, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
