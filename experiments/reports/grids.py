"""Grids of panels: curves of networks against layers or steps, and one point per network against a key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from experiments.archive import labels
from experiments.evidence.colors import COLORS, ordered
from experiments.reports.roles import PAGE, with_roles
from gradscope import frames, plots
from gradscope.plots import drawing

MAX_PAGES = 12  # figures of panels per quantity
MAX_COLORS = 10  # more colors, and those of numbers, are shades from dark to light
THEORY: dict[str, Any] = {"marker": "_", "color": "0.1", "linestyle": "none", "markersize": 10, "label": "mean field"}
WIDE = 1e3  # the y axis is logarithmic if the largest value exceeds this multiple of the smallest
MAX_TICKS = 12  # an axis with at most this number of values of a key has a tick at every value
FAR = 15  # the axis of a key is logarithmic if the largest value exceeds this multiple of the smallest
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (3, 1, 1, 1)))
MARKERS = "os^D"
ROWS_PER_PAGE = 48  # rates per figure
INTERVAL = "bars: 95 % interval"
NAME_WIDTH = 60  # characters per line of a name
CHARACTERS = 12  # of a title, per inch
TITLE = 0.25  # inches per line of a title

Names = Mapping[str, list[str]]  # role -> keys


def curves(rows: pd.DataFrame, quantity: str, roles: Names, title: str, x: str | None = None) -> dict[str, Figure]:
    """Figures of a quantity against layers, or against the column ``x``: means over seeds with bands, in panels."""
    y, label = ("value" if "value" in rows else quantity), plots.LABELS.get(quantity, quantity.replace("_", " "))
    if quantity == "gsc":
        rows, y = frames.to_last_target(rows), "log10_value"
    elif quantity not in rows and (rows[y] > 0).all() and rows[y].max() > WIDE * rows[y].min():
        rows, label = rows.assign(value=np.log10(rows[y])), rf"$\log_{{10}}$ {label}"
    x = x or ("depth_from_output" if quantity == "gsc" else "index")
    rows = finite(with_roles(rows, roles), y, quantity)

    def draw(part: pd.DataFrame, name: str) -> Figure:
        columns = {role: role for role in ("hue", "style", "col", "row") if role in roles}
        # seaborn writes a solid line as ""
        dashes = {
            name: dash[1] if dash != "-" else "" for name, dash in zip(_values(part, "style"), DASHES, strict=False)
        }
        grid = sns.relplot(
            part, x=x, y=y, kind="line", errorbar="sd" if part["seed"].nunique() > 1 else None, linewidth=1.5,
            palette=_colors(part), dashes=dashes, **_size(part), **columns, **_wrap(part),
        )  # fmt: skip
        if grid.legend is not None:
            grid.legend.remove()
        for ax in grid.axes.flat:
            ax.xaxis.get_major_locator().set_params(integer=True)
        if quantity == "gsc":
            grid.refline(y=0, color="0.6", linewidth=0.8, linestyle="-", zorder=0)
        words = (plots.LABELS.get(x, x.replace("_", " ")), label)
        return _finished(grid, part, words, f"{title}{name}\n{spread(part)}", y)

    return dict(_pages(rows, quantity if x in ("depth_from_output", "index") else f"{quantity}_over_{x}", draw))


def points(
    table: pd.DataFrame, x: str, quantity: str, words: tuple[str, str], roles: Names, title: str
) -> dict[str, Figure]:
    """Figures of one point per network against a key: columns ``value``, ``low``, ``high`` and perhaps ``theory``.

    ``words``: the label of the y axis, and a phrase that says what the bars are.
    """
    table = finite(with_roles(table, roles), "value", quantity)
    numeric = pd.api.types.is_numeric_dtype(table[x]) and bool(table[x].notna().all())
    ticks = [] if numeric else list(dict.fromkeys(labels.labeled(table, [x])[x]))
    place = table[x].astype(float) if numeric else labels.labeled(table, [x])[x].map(ticks.index)
    table = table.assign(place=place)
    values = np.unique(place)
    far = numeric and values[0] > 0 and values[-1] > FAR * values[0]  # a logarithmic axis
    steps = np.diff(np.log(values) if far else values)
    gap = (0.2 if numeric else 0.6) * min(steps, default=0.0)  # points of different lines at one value are shifted

    def draw(part: pd.DataFrame, name: str) -> Figure:
        columns = {role: role for role in ("col", "row") if role in roles}
        grid, colors = sns.FacetGrid(part, **_size(part), **columns, **_wrap(part)), _colors(part) or {}
        beside = ""
        for (row, column, _), panel in grid.facet_data():
            lines = list(_lines(panel))
            for number, (key, line) in enumerate(lines):
                line = line.sort_values("place")
                shift = gap * ((number + 0.5) / len(lines) - 0.5)
                place = line["place"] * np.exp(shift) if far else line["place"] + shift
                _bars(grid.facet_axis(row, column), line.assign(place=place), key, colors, part, joined=numeric)
                beside = "; points shifted sideways" if shift else beside
        for ax in grid.axes.flat:
            if quantity == "rate":
                ax.axhline(1.0, color="0.6", linewidth=0.8, zorder=0)
            if not numeric:
                short = ["\n".join(fill(line, 12) for line in labels.wrapped(tick, 12).split("\n")) for tick in ticks]
                drawing.name_layers(ax.xaxis, range(len(ticks)), short)
                ax.set_xlim(-0.5, len(ticks) - 0.5)
                continue
            if far:
                ax.set_xscale("log")
                ax.xaxis.set_minor_formatter(NullFormatter())
            if len(values) <= MAX_TICKS:
                ax.minorticks_off()
                drawing.name_layers(ax.xaxis, values, [f"{value:g}" for value in values])
        return _finished(grid, part, (x.replace("_", " "), words[0]), f"{title}{name}\n{words[1]}{beside}", "value")

    return dict(_pages(table, f"{quantity}_over_{re.sub(r'[^A-Za-z0-9_.]+', '_', x)}", draw))


def rates(growth: pd.DataFrame, title: str) -> dict[str, Figure]:
    """Figures that list the growth rate of every ``network``, at most `ROWS_PER_PAGE` in each, all with one scale."""
    growth = growth.assign(
        network=[labels.wrapped(labels.in_prose(name), NAME_WIDTH) for name in growth[labels.NETWORK]]
    )
    lines = growth["network"].str.count("\n").max() + 1
    longest = max(len(line) for name in growth["network"] for line in name.split("\n"))
    ends = growth[["rate", "rate_low", "rate_high", "theory"]].to_numpy(dtype=float)
    low, high = np.nanmin(ends), np.nanmax(ends)
    made, about = {}, seeded(growth["num_seeds"], INTERVAL, of_one=True)
    pages = -(-len(growth) // ROWS_PER_PAGE)
    for page, first in enumerate(range(0, len(growth), ROWS_PER_PAGE), start=1):
        part = growth.iloc[first : first + ROWS_PER_PAGE]
        size = (6.4 + 0.065 * longest, 1.4 + 0.22 * lines * len(part))
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        plots.rates(part, ax=ax)
        ax.set_xlim(*(ax.get_xlim() if pages == 1 else (low - 0.05 * (high - low), high + 0.05 * (high - low))))
        which = f"; networks {first + 1} to {first + len(part)} of {len(growth)}" if pages > 1 else ""
        figure.suptitle(f"{fill(f'{title}{which}', int(CHARACTERS * size[0]))}\n{about}", fontsize=10)
        made["rates" if page == 1 else f"rates_{page}"] = figure
    return made


def finite(rows: pd.DataFrame, y: str, quantity: str) -> pd.DataFrame:
    """The rows whose value is finite.  Prints for which networks values are left out."""
    good = np.isfinite(rows[y].astype(float))
    why = "it needs six layers with GSC above zero" if quantity == "rate" else "missing, zero or not finite"
    if not good.any():
        raise ValueError(f"There is nothing to draw: no network has a finite {quantity} ({why}); draw another y=.")
    if not good.all():
        left_out(f"{quantity} ({why})", rows.loc[~good, labels.NETWORK].unique())
    return rows[good]


def left_out(what: str, names: Any) -> None:
    """Print what no figure shows, and of which networks."""
    print(f"Not drawn: {what}, of {', '.join(map(str, names))}.")


def spread(frame: pd.DataFrame) -> str:
    """A phrase for titles that says what lines and bands show."""
    by_network = frame.groupby(labels.NETWORK, observed=True)["seed"] if labels.NETWORK in frame else frame["seed"]
    return seeded(np.atleast_1d(by_network.nunique()), "band: one standard deviation")


def seeded(seeds: Any, shown: str, of_one: bool = False) -> str:
    """A phrase for titles: the number of seeds and, if there are several (or if ``of_one``), ``shown``."""
    number = f"{seeds.max()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    several = bool(seeds.max() > 1)
    return (f"mean over {number} seeds" if several else "one seed") + (f", {shown}" if several or of_one else "")


def _pages(
    rows: pd.DataFrame, name: str, draw: Callable[[pd.DataFrame, str], Figure]
) -> Iterator[tuple[str, Figure]]:  # fmt: skip
    """One figure per page, named after the values of its keys."""
    if PAGE not in rows:
        yield name, draw(rows, "")
        return
    pages = list(rows.groupby(PAGE, observed=True, sort=False))
    for page, part in pages[:MAX_PAGES]:
        if "hue" in part:
            part = part.assign(hue=part["hue"].cat.remove_unused_categories())
        yield f"{name}_{re.sub(r'[^A-Za-z0-9_=.-]+', '_', str(page))}", draw(part, f"; {page}")
    if pages[MAX_PAGES:]:
        rest = pd.concat([part[labels.NETWORK] for _, part in pages[MAX_PAGES:]]).unique()
        left_out(f"{name} in panels (choose hue=, col= and row=)", rest)


def _values(part: pd.DataFrame, role: str) -> list[str]:
    """The values of a role in the order of its categories; none if no key has this role."""
    return list(part[role].cat.categories) if role in part else []


def _colors(part: pd.DataFrame) -> dict[str, Any] | None:
    values = _values(part, "hue")
    if not values:
        return None
    shades = len(values) > MAX_COLORS or part["hue"].cat.ordered
    return dict(zip(values, ordered(len(values)) if shades else COLORS, strict=False))


def _size(part: pd.DataFrame) -> dict[str, float]:
    panels = max(1, len(_values(part, "col"))) * max(1, len(_values(part, "row")))
    return {"height": 3.2 if panels > 2 else 4.2, "aspect": 1.15 if panels > 2 else 1.4}


def _wrap(part: pd.DataFrame) -> dict[str, int]:
    """Number of panels per row if rows have no meaning: close to the number of rows, so that no panel is flat."""
    panels = len(_values(part, "col"))
    return {"col_wrap": -(-panels // math.isqrt(panels))} if panels and "row" not in part else {}


def _lines(panel: pd.DataFrame) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The lines of a panel, each with its values of color and dash. Networks of one line differ only in the x axis."""
    keys = [role for role in ("hue", "style") if role in panel]
    if not keys:
        yield {}, panel
        return
    for key, line in panel.groupby(keys, observed=True, sort=False):
        yield dict(zip(keys, map(str, key), strict=True)), line


def _bars(
    ax: Axes, line: pd.DataFrame, key: Mapping[str, str], colors: Mapping[str, Any], part: pd.DataFrame, joined: bool
) -> None:
    """Draw the points of one line with their intervals, and theory as strokes."""
    place, color = line["place"], colors.get(key.get("hue", ""), COLORS[0])
    number = _values(part, "style").index(key["style"]) if "style" in key else 0
    ends = [(line["value"] - line["low"]).clip(lower=0), (line["high"] - line["value"]).clip(lower=0)]
    ax.errorbar(
        place, line["value"], yerr=np.nan_to_num(ends), color=color, marker=MARKERS[number],
        linestyle=DASHES[number] if joined else "none", linewidth=1.2, markersize=5, capsize=2,
    )  # fmt: skip
    if "theory" in line:
        ax.plot(place, line["theory"], **THEORY, zorder=3)


def _finished(grid: sns.FacetGrid, part: pd.DataFrame, axis_labels: tuple[str, str], title: str, y: str) -> Figure:
    """The figure with titles, labels and a legend, none of which overlap."""
    figure, size = grid.figure, _size(part)
    width, height = size["height"] * size["aspect"], size["height"]
    grid.set_titles("{row_name}, {col_name}" if {"row", "col"} <= {*part} else "{col_name}{row_name}".replace(
        "{col_name}" if "col" not in part else "{row_name}", ""), size=10)  # fmt: skip
    for ax in grid.axes.flat:
        ax.set_title(fill(labels.in_prose(ax.get_title()), int(CHARACTERS * width)), fontsize=10)
    grid.set_axis_labels(fill(axis_labels[0], int(CHARACTERS * width)), fill(axis_labels[1], int(CHARACTERS * height)))
    colors = list((_colors(part) or {}).items())
    means = [part.loc[part["hue"] == value, y].mean() for value, _ in colors]
    if colors and part["hue"].cat.ordered and means[-1] > means[0]:
        colors.reverse()  # the legend has the vertical order of the curves
    handles = [Line2D([], [], color=color, label=labels.wrapped(labels.in_prose(value), 30)) for value, color in colors]
    for number, value in enumerate(_values(part, "style")):
        marker = MARKERS[number] if "place" in part else ""
        handles.append(Line2D([], [], color="0.2", linestyle=DASHES[number], marker=marker, markersize=4,
                              label=labels.wrapped(labels.in_prose(value), 30)))  # fmt: skip
    if "theory" in part and part["theory"].notna().any():
        handles.append(Line2D([], [], **THEORY))
    figure.set_layout_engine("constrained")
    if handles:
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)
        longest = max(len(str(handle.get_label())) for handle in handles)
        figure.set_size_inches(figure.get_figwidth() + 0.5 + 0.08 * longest, figure.get_figheight())
    first, *rest = title.split("\n")
    lines = [fill(line, int(CHARACTERS * figure.get_figwidth())) for line in (first, *rest)]
    figure.suptitle("\n".join(lines), fontsize=10)
    figure.set_figheight(figure.get_figheight() + TITLE * len(lines))  # the panels keep their height
    return figure
