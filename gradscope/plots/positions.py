"""GSC by position: heat maps of blocks, curves over positions, and curves over the lag between two positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from gradscope.choices import checked, require, shown
from gradscope.plots.drawing import axes, curve, graded, ink, label_ends, short_names, whole_numbers
from gradscope.plots.rows import frame_of

MAKER = 'gradscope.gsc(model, data, positions="both").to_frame()'
SEQUENTIAL = "viridis"  # dark to bright, readable with common kinds of color blindness, and in gray
DECADES = 6.0  # of the color scale below the largest block
MOST_CURVES = 5  # layers that are drawn by default
ZERO = "0.75"  # gray of blocks that are exactly zero
WORDS = {"target_position": "target position $t$", "source_position": "source position $s$", "lag": "lag $t - s$"}


@checked
def positions(data: Any, *, layers: str | Sequence[str] | None = None, ax: Axes | None = None) -> Axes:
    """Axes with GSC by position: a heat map of one layer over source and target positions, or curves of several layers.

    Curves show GSC with 95 % intervals, against the source position, the target position, or the lag between them.

    Arguments:
        data: A `gradscope.Positions`, its frame, or a frame of its ``lag_profile()``.
        layers: Names of layers.  By default the first layer for a heat map, and up to five layers for curves.
        ax: Where to draw; a new figure by default.

    In a heat map, values of exactly zero are gray, and values below a millionth of the largest one have the darkest
    color.  Circles to the left of curves over the lag stand for the first source positions, which ``lag_profile()``
    leaves out of the means by lag.  Each circle shows the mean GSC from its source position to all target positions.

    Raises:
        ValueError: The frame has no GSC by position or lag; or ``layers`` is empty, holds an unknown name, or holds
            several names for a heat map.

    >>> import torch, gradscope as gs
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm((3, 4)), torch.nn.Linear(4, 2))
    >>> found = gs.gsc(model, torch.randn(8, 3, 4), positions="both")
    >>> positions(found).get_xlabel()
    'source position $s$'
    """
    frame = frame_of(data)
    require(frame, ("quantity", "layer", "index", "log10_value", "log10_low", "log10_high"), MAKER)
    lags = frame[frame["quantity"] == "gsc_by_lag"]
    rows = lags if len(lags) else frame[frame["quantity"] == "gsc_by_position"]
    if rows.empty:
        raise ValueError(f"The frame has no blocks of positions and no lags: draw a frame of {MAKER}.")
    names = rows.drop_duplicates("layer").sort_values("index", kind="stable")["layer"].tolist()
    both = not len(lags) and rows["target_position"].notna().any() and rows["source_position"].notna().any()
    chosen = _chosen(names, layers, 1 if both else MOST_CURVES)
    if both:
        if len(chosen) > 1:
            raise ValueError(f"A heat map shows the blocks of one layer, got layers={shown(layers)}.")
        return _heat_map(rows[rows["layer"] == chosen[0]], chosen[0], ax)
    place = "lag" if len(lags) else "source_position" if rows["source_position"].notna().any() else "target_position"
    ax = axes(ax, (7.2, 4.2))
    ends = []
    for name, color in zip(chosen, graded(ax, len(chosen)), strict=True):
        x, y = _line(ax, rows[rows["layer"] == name], place, color)
        ends.append((short_names(chosen)[chosen.index(name)], x, y, color))
        if len(lags):
            sinks = frame[(frame["quantity"] == "gsc_of_sink") & (frame["layer"] == name)]
            _sinks(ax, sinks, lags, color, named=name == chosen[0])
    ax.xaxis.set_major_locator(whole_numbers())
    if len(lags):  # the circles at the left have no lag
        ax.set_xticks([tick for tick in ax.get_xticks() if _least(lags) <= tick <= ax.get_xlim()[1]])
    label_ends(ax, ends)
    what = r"$\log_{10}$ of the mean GSC of a block" if len(lags) else r"$\log_{10}$ GSC (squared convention)"
    ax.set(xlabel=WORDS[place], ylabel=what)
    return ax


def _chosen(names: Sequence[str], layers: str | Sequence[str] | None, most: int) -> list[str]:
    """The layers to draw; by default ``most`` of them in even steps, without the target, which is last."""
    if layers is None:
        before = list(names[:-1] or names)
        return [before[int(place)] for place in np.unique(np.linspace(0, len(before) - 1, most).astype(int))]
    wanted = [layers] if isinstance(layers, str) else list(layers)
    if not wanted or (unknown := [name for name in wanted if name not in names]):
        raise ValueError(f"layers must be some of {', '.join(names)}; got {shown(unknown if wanted else wanted)}.")
    return wanted


def _heat_map(rows: pd.DataFrame, name: str, ax: Axes | None) -> Axes:
    """Blocks of one layer: targets downward, sources to the right, as in a matrix of attention."""
    table = rows.pivot(index="target_position", columns="source_position", values="log10_value")
    values = 10 ** (table.to_numpy(dtype=np.float64))
    top = float(values.max())
    ax = axes(ax, (5, 4.2))
    ax.set_facecolor(ZERO)
    norm = LogNorm(max(float(values[values > 0].min()), top * 10**-DECADES), top)
    visible = np.ma.masked_equal(values, 0.0)
    drawn = ax.pcolormesh(visible, norm=norm, cmap=SEQUENTIAL)
    ax.set(xlim=(0, values.shape[1]), ylim=(values.shape[0], 0), aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        step = max(1, -(-values.shape[0] // 8))
        axis.set_ticks(np.arange(0, values.shape[0], step) + 0.5, [str(n) for n in range(0, values.shape[0], step)])
    extend = "min" if (values[values > 0] < norm.vmin).any() else "neither"
    ax.figure.colorbar(drawn, ax=ax, label="GSC of a block (squared convention)", extend=extend)
    ax.set(xlabel=WORDS["source_position"], ylabel=WORDS["target_position"], title=f"{name}; gray: exactly 0")
    return ax


def _line(ax: Axes, rows: pd.DataFrame, place: str, color: Any) -> tuple[float, float]:
    """Draw one layer, and return the right end of its curve."""
    rows = rows.sort_values(place).rename(columns={"log10_value": "mean", "log10_low": "low", "log10_high": "high"})
    rows = rows.assign(mean=rows["mean"].where(np.isfinite(rows["mean"]), np.nan))
    curve(ax, rows[place].astype(float), rows, color=color)
    last = rows.dropna(subset="mean").iloc[-1]
    return float(last[place]), float(last["mean"])


def _least(lags: pd.DataFrame) -> float:
    """The least lag whose blocks are not exactly zero."""
    return float(lags.loc[np.isfinite(lags["log10_value"]), "lag"].min())


def _sinks(ax: Axes, rows: pd.DataFrame, lags: pd.DataFrame, color: Any, *, named: bool) -> None:
    """Draw circles for the first source positions, left of all curves, with names above if ``named``."""
    left = _least(lags)
    for number, (_, row) in enumerate(rows.sort_values("source_position", ascending=False).iterrows()):
        x, y = left - 2 - number, row["log10_value"]
        ax.errorbar(
            [x], [y], [[y - row["log10_low"]], [row["log10_high"] - y]], fmt="o", color=color, capsize=2, linewidth=1
        )
        if named:
            ax.annotate(
                f"s = {row['source_position']}", (x, 1), (0, -2), xycoords=("data", "axes fraction"), va="top",
                ha="center", textcoords="offset points", fontsize="small", color=ink(ax), rotation=90,
            )  # fmt: skip
