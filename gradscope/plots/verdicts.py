"""Growth rates of networks with their intervals and verdicts."""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from gradscope.choices import checked, require
from gradscope.plots.curves import MAX_DIRECT_LABELS
from gradscope.plots.drawing import (
    MAX_CHARACTERS,
    NOTE_WIDTH,
    axes,
    ink,
    label_ends,
    legend,
    name_layers,
    next_colors,
    reference,
)
from gradscope.plots.rows import frame_of, growth_table, gsc_rows, hue_of

# Number in the caller's cycle of colors, and marker, of each verdict; the markers distinguish verdicts without color.
VERDICTS = {"exploding": (3, "^"), "vanishing": (0, "v"), "stable": (2, "o"), "undecided": (7, "s")}
OTHER = (5, "D")
RATES = "gradscope.growth: columns rate, rate_low, rate_high and verdict, one row per network"


@checked
def convergence(data: Any, *, hue: str | None = None, ax: Axes | None = None) -> Axes:
    """Axes with measured growth rates of GSC and their 95 % intervals against 1 / width.

    Mean-field rates, if given, are stars at infinite width, and dashed lines.

    Arguments:
        data: A frame with one row per network and the columns ``width``, ``rate``, ``rate_low`` and ``rate_high``, and
            optionally ``theory``, the mean-field rate.  Rows without a rate are left out.  Or a tidy frame of GSC with
            the column ``width``, from which the rates are computed.
        hue: The column that determines the color of a curve.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: A column is missing, every rate is missing, or a curve has two points of one width.

    >>> rates = {"rate": 1.2, "rate_low": 1.1, "rate_high": 1.3, "theory": 1.25}
    >>> convergence(pd.DataFrame({"width": [50, 100], "norm": "layer", **rates}), hue="norm").texts[0].get_text()
    'layer: mean field 1.250'
    """
    frame = frame_of(data)
    if "rate" not in frame:
        rows = gsc_rows(frame, "width")
        hue = hue_of(rows, hue, "width")
        frame = growth_table(rows, ["width"] if hue is None else [hue, "width"])
    keys = ["width"] if hue is None else ["width", hue]
    require(frame, [*keys, "rate", "rate_low", "rate_high"], RATES)
    if frame.duplicated(keys).any():
        raise ValueError("A width occurs more than once in a curve: name the column that distinguishes them as hue=.")
    frame = frame[frame["rate"].notna()]
    if frame.empty:
        raise ValueError("Every rate is null, so there is nothing to draw: a rate needs at least six layers.")
    ax, ends = axes(ax), []
    groups: list[tuple[Any, pd.DataFrame]] = (
        list(frame.groupby(hue, sort=False, observed=True)) if hue is not None else [("", frame)]
    )
    for style, (name, rows) in zip(next_colors(ax, len(groups)), groups, strict=True):
        rows, color = rows.sort_values("width"), style["color"]
        inverse, spread = 1 / rows["width"].astype(float), _error_bars(rows)
        words = [str(name)] if name != "" else []
        if "theory" in rows and np.isfinite(limit := float(rows["theory"].iloc[0])):
            words.append(f"mean field {limit:.3f}")
            ax.axhline(limit, color=color, linewidth=0.8, linestyle=(0, (4, 2.5)))
            ax.plot(0, limit, marker="*", markersize=12, color=color, clip_on=False, zorder=5)
        ax.errorbar(
            inverse, rows["rate"], yerr=spread, fmt="o-", color=color, linewidth=1, markersize=4, capsize=2,
            label=": ".join(words) or None,
        )  # fmt: skip
        ends += [(fill(": ".join(words), NOTE_WIDTH), inverse.iloc[0], float(rows["rate"].iloc[0]), color)] * bool(
            words
        )
    widths = sorted(frame["width"].unique(), reverse=True)
    name_layers(ax.xaxis, [0, *(1 / float(width) for width in widths)], ["\N{INFINITY}", *map(str, widths)])
    ax.set(xlabel="width (linear in 1 / width)", ylabel="GSC rate per layer (squared convention)")
    if len(groups) > MAX_DIRECT_LABELS:
        legend(ax)
    else:
        label_ends(ax, ends)
    return ax


@checked
def rates(data: Any, *, ax: Axes | None = None) -> Axes:
    """Axes with the growth rate of GSC of each network, its 95 % interval and its verdict.

    Short vertical strokes show mean-field rates.  The long vertical line marks rate 1, at which GSC neither grows nor
    shrinks.

    Arguments:
        data: A `gradscope.Growth`, or a dict from names of networks to growths.  Or the ``data`` of `profile`, from
            which the growth is computed.  Or a frame with one row per network and the columns ``network``, ``rate``,
            ``rate_low``, ``rate_high`` and ``verdict``, as in `gradscope.Growth`.  This frame may have a
            column ``theory`` of mean-field rates; those that are NaN are not drawn.
        ax: Where to draw; a new figure by default.

    >>> growth = {"rate": [1.2], "rate_low": [1.1], "rate_high": [1.3], "verdict": ["exploding"], "theory": [1.25]}
    >>> ax = rates(pd.DataFrame({"network": ["tanh"], **growth}))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['mean field', 'exploding']
    """
    table = growth_table(data).reset_index(drop=True)
    require(table, ["network", "rate", "rate_low", "rate_high", "verdict"], RATES)
    ax = axes(ax, (5.4 + 0.07 * max(MAX_CHARACTERS, *map(len, table["network"])), 1.2 + 0.22 * len(table)))
    colors = [style["color"] for style in next_colors(ax, 8)]
    reference(ax, x=1.0)
    for verdict, rows in table.groupby("verdict", sort=False, observed=True):
        number, marker = VERDICTS.get(str(verdict), OTHER)
        ax.errorbar(
            rows["rate"], rows.index, xerr=_error_bars(rows), fmt=marker, color=colors[number], linewidth=1.2,
            markersize=5, capsize=2, label=str(verdict),
        )  # fmt: skip
    if "theory" in table and table["theory"].notna().any():
        ax.plot(
            table["theory"], table.index, "|", color=ink(ax), markersize=11, markeredgewidth=1.4, zorder=3,
            label="mean field",
        )  # fmt: skip
    ax.set_ylim(len(table) - 0.5, -0.5)
    name_layers(ax.yaxis, range(len(table)), table["network"].tolist())
    ax.set_xlabel("GSC rate per layer (squared convention)")
    ax.grid(axis="y", color=ink(ax), alpha=0.07, zorder=-1)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


def _error_bars(rows: pd.DataFrame) -> list[pd.Series]:
    """Distances from each rate to the lower and to the upper end of its interval."""
    return [(rows["rate"] - rows["rate_low"]).clip(lower=0), (rows["rate_high"] - rows["rate"]).clip(lower=0)]
