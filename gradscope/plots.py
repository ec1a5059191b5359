"""Figures: a tidy frame in, matplotlib Axes out.  Nothing is measured here, nothing is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradscope.frames import COLUMNS

LABELS = {
    "gsc": r"$\log_{10}$ GSC (squared convention)",
    "preactivation_std": "pre-activation standard deviation",
    "sign_diversity": "sign diversity",
    "depth_from_output": "layers between $f_k$ and the target",
    "index": "layer, from the input",
}
DIVERGING = "vlag"  # red and blue about white: told apart with every common color blindness, and in gray by lightness
MAX_DIRECT_LABELS = 8
MAX_NAMED_LAYERS = 24
MAX_ANNOTATED = 12
LABEL_HEIGHT = 0.047  # of the axis


def profile(
    frame: pd.DataFrame,
    *,
    hue: str | None = None,
    style: str | None = None,
    notes: Mapping[tuple[str, ...], str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """log10 GSC of every layer to the last target, against the number of layers in between.

    Arguments:
        frame: Tidy frame; rows of quantity "gsc" toward the last target of each run are drawn.
        hue, style: Columns that tell curves apart by color and by dash.
        notes: Words to add to the label of a curve, a verdict say, by its values of hue and style.
        ax: Where to draw.  Default: a new figure.

    A line is the mean over the runs that share hue and style, the band one standard deviation between them.

    Raises:
        ValueError: No such rows.
    """
    rows = to_last_target(_rows(frame, "gsc"))
    ax = _curves(rows, "depth_from_output", "log10_value", hue, style, ax, notes=notes)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel=LABELS["depth_from_output"], ylabel=LABELS["gsc"])
    return ax


def named_profile(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """log10 GSC to the last target of one network of few layers, in execution order, each layer under its name.

    Bands are one standard deviation between runs; with a single run, bars are its standard error of sampling the batch.
    """
    rows = to_last_target(_rows(frame, "gsc"))
    ax = _curves(rows, "index", "log10_value", None, None, ax, marker="o")
    names = rows.drop_duplicates("index").sort_values("index")
    ax.set_xticks(names["index"], names["layer"], rotation=60, ha="right", rotation_mode="anchor")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="", ylabel=LABELS["gsc"])
    if _runs(rows) == 1:
        ax.errorbar(rows["index"], rows["log10_value"], rows["log10_stderr_sample"].fillna(0), fmt="none", color="0.4")
    return ax


def theory(predicted: pd.DataFrame, keys: Sequence[str], *, ax: Axes) -> Axes:
    """Predicted log10 GSC behind the measured curves of `profile`, dashed, one line for each network of ``keys``.

    ``predicted``: columns ``depth_from_output``, ``log10_value`` and the keys.
    """
    for number, (_, rows) in enumerate(predicted.groupby(list(keys), sort=False, observed=True)):
        ax.plot(
            rows["depth_from_output"], rows["log10_value"], color="0.15", linewidth=0.9, linestyle=(0, (4, 2.5)),
            zorder=1.5, label="mean field" if number == 0 else "_nolegend_",
        )  # fmt: skip
    handles = [line for line in ax.get_lines() if line.get_label() == "mean field"]
    ax.legend(handles=handles, loc="upper left", frameon=False, fontsize=9)
    return ax


def convergence(frame: pd.DataFrame, *, hue: str, ax: Axes | None = None) -> Axes:
    """Measured rates against 1 / width with 95 % intervals, and theory as a star at infinite width.

    ``frame``: one row a network, with columns ``width``, ``rate``, ``rate_low``, ``rate_high``, ``theory`` and ``hue``.
    """
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    colors = sns.color_palette("colorblind")
    for color, (name, rows) in zip(colors, frame.groupby(hue, sort=False, observed=True), strict=False):
        rows = rows.sort_values("width")
        inverse = 1 / rows["width"].astype(float)
        spread = [rows["rate"] - rows["rate_low"], rows["rate_high"] - rows["rate"]]
        ax.errorbar(inverse, rows["rate"], yerr=spread, fmt="o-", color=color, linewidth=1, markersize=4, capsize=2)
        ax.axhline(float(rows["theory"].iloc[0]), color=color, linewidth=0.8, linestyle=(0, (4, 2.5)))
        ax.plot(0, rows["theory"].iloc[0], marker="*", markersize=12, color=color, clip_on=False, zorder=5)
        ax.annotate(
            f"{name}: theory {rows['theory'].iloc[0]:.4f}", (0, rows["theory"].iloc[0]), xytext=(8, 6),
            textcoords="offset points", color=color, fontsize=9,
        )  # fmt: skip
    widths = sorted(frame["width"].unique(), reverse=True)
    ax.set_xticks(
        [0, *(1 / float(width) for width in widths)], [r"$\infty$", *map(str, widths)], rotation=60, fontsize=8
    )
    ax.set(xlabel="width (linear in 1 / width)", ylabel="GSC rate a layer (squared convention)")
    sns.despine(ax=ax)
    return ax


def phase_diagram(
    weight_variances: npt.ArrayLike,
    bias_variances: npt.ArrayLike,
    chi_1: npt.NDArray[np.float64],
    *,
    points: pd.DataFrame | None = None,
    ax: Axes | None = None,
) -> Axes:
    """chi_1 over weight and bias variance with the critical line chi_1 = 1, and measured networks on it.

    ``chi_1[i, j]`` at ``weight_variances[i]``, ``bias_variances[j]``.  ``points``: columns ``weight_variance``,
    ``bias_variance`` and ``rate``, drawn on the same scale, which then spans their rates, and labeled.
    """
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.6), layout="constrained")[1]
    scale = np.log10(chi_1 if points is None else points["rate"].to_numpy(dtype=np.float64))
    limit = float(np.nanmax(np.abs(scale)))
    shown = ax.pcolormesh(
        weight_variances, bias_variances, np.log10(chi_1).T, cmap=DIVERGING, vmin=-limit, vmax=limit, shading="gouraud"
    )
    lines = ax.contour(weight_variances, bias_variances, chi_1.T, levels=[1.0], colors="black", linewidths=1.5)
    ax.clabel(lines, fmt={1.0: r"$\chi_1 = 1$"}, fontsize=9)
    if points is not None:
        ax.scatter(
            points["weight_variance"], points["bias_variance"], c=np.log10(points["rate"]), cmap=DIVERGING, vmin=-limit,
            vmax=limit, edgecolor="black", linewidth=0.8, s=60, zorder=3, clip_on=False,
        )  # fmt: skip
        for x, y, rate in zip(points["weight_variance"], points["bias_variance"], points["rate"], strict=True):
            ax.annotate(f"{rate:.2f}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
    ax.figure.colorbar(shown, ax=ax, label=r"$\log_{10}$ growth of GSC a layer")
    ax.set(xlabel=r"weight variance $\sigma_w^2$", ylabel=r"bias variance $\sigma_b^2$")
    return ax


def statistic(
    frame: pd.DataFrame, quantity: str, *, hue: str | None = None, style: str | None = None, ax: Axes | None = None
) -> Axes:
    """A statistic of every layer by itself ("preactivation_std", "sign_diversity") against depth, input first.

    Lines, bands and errors as in `profile`.
    """
    ax = _curves(_rows(frame, quantity), "index", "value", hue, style, ax)
    ax.set(xlabel=LABELS["index"], ylabel=LABELS.get(quantity, quantity))
    ax.set_ylim(bottom=0)
    return ax


def matrix(
    frame: pd.DataFrame, *, limits: tuple[float, float] | None = None, colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """log10 GSC of every source (column) to every target (row) as a heat map, the mean over runs.

    Arguments:
        frame: Tidy frame with rows of quantity "gsc" toward several targets.
        limits: Ends of the color scale, so that panels can share one.  Default: symmetric about 0.
    """
    rows = _rows(frame, "gsc")
    rows = rows[rows["layer"].isin(rows["target"])]
    order = rows.drop_duplicates("layer").sort_values("index")["layer"]
    table = rows.pivot_table(index="target", columns="layer", values="log10_value", aggfunc="mean", observed=True)
    table = table.reindex(index=order, columns=order)
    largest = float(np.nanmax(np.abs(table.to_numpy()))) or 1.0
    low, high = limits or (-largest, largest)
    ax = ax if ax is not None else plt.subplots(figsize=(5, 4.2), layout="constrained")[1]
    sns.heatmap(
        table, mask=table.isna(), vmin=low, vmax=high, cmap=DIVERGING, square=True, ax=ax, cbar=colorbar,
        annot=table.round(1) + 0.0 if len(order) <= MAX_ANNOTATED else False, fmt=".1f", annot_kws={"size": 7},
        cbar_kws={"label": LABELS["gsc"]}, xticklabels=_thinned(order), yticklabels=_thinned(order),
    )  # fmt: skip
    ax.set(xlabel="source layer $k$", ylabel="target layer $l$")
    plt.setp(ax.get_xticklabels(), rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    plt.setp(ax.get_yticklabels(), rotation=0, fontsize=8)
    return ax


def to_last_target(rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows of quantity "gsc", those toward their run's last target; runs differ in columns beyond the schema."""
    own = rows["index"].where(rows["depth_from_output"] == 0)
    runs = [rows[name] for name in rows.columns if name not in COLUMNS]
    last = own.groupby(runs, dropna=False, observed=True).transform("max") if runs else own.max()
    return rows[rows["index"] + rows["depth_from_output"] == last]


def _rows(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    rows = frame[frame["quantity"] == quantity]
    if rows.empty:
        known = ", ".join(map(repr, frame["quantity"].unique()))
        raise ValueError(f"The frame has no rows of quantity {quantity!r}; it has {known}.")
    return rows


def _curves(
    rows: pd.DataFrame,
    x: str,
    y: str,
    hue: str | None,
    style: str | None,
    ax: Axes | None,
    marker: str | None = None,
    notes: Mapping[tuple[str, ...], str] | None = None,
) -> Axes:
    """Mean lines with bands of one standard deviation, labeled at their ends while they are few."""
    ax = ax if ax is not None else plt.subplots(figsize=(6.4, 4.2), layout="constrained")[1]
    keys = [key for key in (hue, style) if key is not None]
    sns.lineplot(
        rows, x=x, y=y, hue=hue, style=style,
        errorbar="sd" if _runs(rows) > 1 else None, palette="colorblind" if hue else None,
        color=None if hue else sns.color_palette("colorblind")[0], marker=marker, ax=ax, linewidth=1.8,
    )  # fmt: skip
    sns.despine(ax=ax)
    legend = ax.get_legend()
    curves = {_names(key): part for key, part in rows.groupby(keys, observed=True, sort=False)} if keys else {}
    if legend is not None and 1 < len(curves) <= MAX_DIRECT_LABELS:
        handles = zip(legend.get_texts(), legend.legend_handles, strict=True)
        colors = {text.get_text(): handle.get_color() for text, handle in handles if isinstance(handle, Line2D)}
        _label_ends(ax, curves, x, y, notes or {}, colors)
        legend.remove()
    return ax


def _label_ends(
    ax: Axes,
    curves: Mapping[tuple[str, ...], pd.DataFrame],
    x: str,
    y: str,
    notes: Mapping[tuple[str, ...], str],
    colors: Mapping[str, Any],
) -> None:
    """Write each curve's name at its right end instead of a legend, moved apart where they would overlap."""
    ends = {}
    for name, rows in curves.items():
        last = float(rows[x].max())
        ends[name] = last, float(rows.loc[rows[x] == last, y].mean())
    order = sorted(ends, key=lambda name: ends[name][1])
    heights = [ends[name][1] for name in order]
    low, high = ax.get_ylim()
    gap = (high - low) * LABEL_HEIGHT
    for _ in range(100):  # push overlapping neighbors apart until all fit
        for a in range(len(heights) - 1):
            if (overlap := gap - (heights[a + 1] - heights[a])) > 1e-9:
                heights[a] -= overlap / 2
                heights[a + 1] += overlap / 2
    right = max(last for last, _ in ends.values())
    for name, height in zip(order, heights, strict=True):
        color = colors.get(name[0], "0.2")
        ax.annotate(
            "+".join(part for part in name if part != "none") + (f": {notes[name]}" if name in notes else ""),
            ends[name], xytext=(right * 1.03, height), va="center",
            fontsize=9, color=color, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _names(key: Sequence[object]) -> tuple[str, ...]:
    return tuple(str(part) for part in key)


def _runs(rows: pd.DataFrame) -> int:
    return int(rows["seed"].nunique()) if "seed" in rows else 1


def _thinned(names: pd.Series) -> list[str]:
    step = int(np.ceil(len(names) / MAX_NAMED_LAYERS))
    return [name if number % step == 0 else "" for number, name in enumerate(names)]
