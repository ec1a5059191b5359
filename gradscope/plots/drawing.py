"""What all figures share on the Axes: colors of the caller's style, lines with bands, and texts that never overlap."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn  # noqa: F401  registers the color map DIVERGING
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.font_manager import FontProperties
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

DIVERGING = "vlag"  # red and blue around white; readable with common kinds of color blindness, and in gray
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (3, 1.25, 1.5, 1.25)), (0, (5, 1, 1, 1, 1, 1)))
BAND_ALPHA = 0.2
MAX_CHARACTERS = 24  # longer names of layers are abbreviated on axes
NAME_ROOM = 1.5  # inches that the names of layers may take from the Axes of a new figure
AIR = 1.15  # lines of text are this many times their height apart
CONTRAST = 3.0  # least contrast of a text, as the Web Content Accessibility Guidelines ask of large text
NOTE_WIDTH = 40  # characters per line of a label beside the Axes
MOST_SHARE = 0.6  # of the height of the Axes that a legend inside may take
CORNERS: tuple[Any, ...] = ("upper left", "upper right", "lower left", "lower right")
ARROW = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
Color = Any


def axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.2), layout: Any = "constrained") -> Axes:
    """The Axes ``ax``, or those of a new figure of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=size, layout=layout)[1]


def ink(ax: Axes) -> Color:
    """The color of text on these Axes: black by default, white on a dark background."""
    return ax.xaxis.label.get_color()


def is_dark(ax: Axes) -> bool:
    """Whether the text is brighter than a medium gray."""
    return sum(to_rgb(ink(ax))) > 1.5


def reference(ax: Axes, *, x: float | None = None, y: float | None = None) -> None:
    """Draw a thin line behind all others at this x or y."""
    style: dict[str, Any] = {"color": ink(ax), "alpha": 0.4, "linewidth": 0.8, "zorder": 0}
    if x is not None:
        ax.axvline(x, **style)
    if y is not None:
        ax.axhline(y, **style)


def next_colors(ax: Axes, num: int) -> list[dict[str, Any]]:
    """The next colors, and dashes and markers if there are any, of the Axes' own property cycle.

    If the cycle would repeat a color, all colors come from the caller's color map instead.
    """
    found = []
    for _ in range(num):
        (line,) = ax.plot([], [])
        found.append({"color": line.get_color(), "linestyle": line.get_linestyle(), "marker": line.get_marker()})
        line.remove()
    if len({tuple(map(str, one.values())) for one in found}) < num:
        return [{"color": color, "linestyle": "-", "marker": "None"} for color in graded(ax, num)]
    return found


def legible(color: Color, ax: Axes) -> Color:
    """The color of a text; if it is pale, mixed with the color of ink until the text is readable on the background.

    >>> legible("yellow", axes(None)).round(1).tolist()
    [0.6, 0.6, 0.0]
    """
    for share in np.linspace(0, 1, 21):
        mixed = (1 - share) * np.array(to_rgb(color)) + share * np.array(to_rgb(ink(ax)))
        luminance = float(mixed**2.2 @ [0.2126, 0.7152, 0.0722]) + 0.05
        if (luminance / 0.05 if is_dark(ax) else 1.05 / luminance) > CONTRAST:
            break
    return mixed if share else color


def graded(ax: Axes, num: int) -> list[Color]:
    """Colors from the caller's color map, in order, all visible on the background."""
    ends = (0.3, 1.0) if is_dark(ax) else (0.0, 0.75)
    return list(plt.get_cmap()(np.linspace(*ends, num)))


def curve(ax: Axes, x: pd.Series, points: pd.DataFrame, *, faint: bool = False, **style: Any) -> Line2D:
    """Draw the columns mean, low and high as a line with a band; a single or isolated point as a marker with a bar."""
    y, low, high = (points[name].to_numpy(dtype=np.float64) for name in ("mean", "low", "high"))
    known = np.isfinite(y)
    alone = known & ~np.r_[False, known[:-1]] & ~np.r_[known[1:], False]
    if alone.any() and style.get("marker", "None") == "None":
        style |= {"marker": "o", "markevery": np.flatnonzero(alone).tolist()}
    (line,) = ax.plot(x, y, **style)
    wide = np.isfinite(low) & np.isfinite(high) & (high > low)
    if (wide & ~alone).any():
        ax.fill_between(
            x, low, high, where=np.isfinite(low) & np.isfinite(high), color=line.get_color(), linewidth=0,
            alpha=BAND_ALPHA / 2 if faint else BAND_ALPHA, zorder=line.get_zorder() - 0.1,
        )  # fmt: skip
    if (only := wide & alone).any():
        ends = np.clip([y - low, high - y], 0, None)[:, only]
        ax.errorbar(x[only], y[only], ends, fmt="none", color=line.get_color(), capsize=2, linewidth=1)
    return line


class Names(FixedLocator):
    """Ticks at as many places as their names have room for when the figure is drawn; every n-th of even ones."""

    def __init__(self, places: npt.ArrayLike, names: Sequence[str]) -> None:
        self.places = np.asarray(places, dtype=np.float64)
        super().__init__(self.places.tolist())
        self.names = list(names)

    def __call__(self) -> Any:
        """The places that are named."""
        axis: Axis = self.axis  # type: ignore[assignment]
        ax, places = axis.axes, self.places
        column = 0 if axis is ax.xaxis else 1
        pixels = ax.transData.transform(np.repeat(places[:, None], 2, axis=1))[:, column]
        label = axis.get_major_ticks(1)[0].label1
        along = column == 0 and label.get_rotation() == 0
        high = "Ag" + "\n" * max(name.count("\n") for name in self.names)
        need = AIR * text_size(self.names if along else [high], label.get_fontproperties(), ax)[0 if along else 1]
        named = [0]
        for number, pixel in enumerate(pixels):
            if abs(pixel - pixels[named[-1]]) >= need - 1e-6:
                named.append(number)
        if len(named) > 1:  # the last layer is often the output, so its name takes the place of the one before
            named[-1] = len(places) - 1
        return places[named]


class CellText(Text):
    """A number in a cell of a heat map.  It is drawn if the widest number of the map fits into a cell."""

    widest = ""

    def draw(self, renderer: Any) -> None:
        """Draw the number, unless the cells are too narrow."""
        ax: Axes = self.axes  # type: ignore[assignment]
        (left, _), (right, _) = ax.transData.transform([(0, 0), (1, 0)])
        if AIR * text_size([self.widest], self.get_fontproperties(), ax)[0] < abs(right - left):
            super().draw(renderer)


def text_size(texts: Sequence[str], font: FontProperties, ax: Axes) -> tuple[float, float]:
    """Width of the widest and height of the highest text, in pixels of the figure."""
    lines = [line for text in texts for line in text.split("\n")]
    sizes = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[:2] for line in lines]
    scale, most = ax.figure.dpi / 72, 1 + max(text.count("\n") for text in texts)
    return max(width for width, _ in sizes) * scale, most * max(height for _, height in sizes) * scale * 1.2


def name_layers(axis: Axis, places: npt.ArrayLike, layers: Sequence[str], *, grow: bool = False) -> None:
    """Name the layers at these places of an axis; names that have no room are left out, and long ones abbreviated.

    With ``grow``, the figure grows with names that would take too much room from the Axes.
    """
    names, numbers = short_names(layers), np.asarray(places, dtype=np.float64)
    at = {place: name.replace("$", r"\$") for place, name in zip(numbers.tolist(), names, strict=True)}
    axis.set_major_locator(Names(places, names))
    axis.set_major_formatter(FuncFormatter(lambda place, _: at.get(float(place), "")))
    ax = axis.axes
    length = text_size(names, axis.get_major_ticks(1)[0].label1.get_fontproperties(), ax)[0]
    if axis is ax.xaxis:
        gaps = np.diff(np.sort(numbers))
        number = 1 + (gaps.sum() / gaps.min() if len(gaps) else 0)  # of places as close as the closest two
        fits = length * AIR * number < ax.get_window_extent().width
        axis.set_tick_params(rotation=0 if fits else 90)
        length *= not fits
    if grow and (more := length / ax.figure.dpi - NAME_ROOM) > 0:
        figure: Any = ax.figure  # a new one, so no SubFigure
        figure.set_size_inches(figure.get_size_inches() + ((0, more) if axis is ax.xaxis else (more, 0)))


def short_names(layers: Sequence[str]) -> list[str]:
    """The names with leading parts abbreviated to a letter where they are long, unless two would become equal.

    >>> short_names(["backbone.encoder.layers.11.attention.output.dense", "head"])
    ['b.e.l.11.a.output.dense', 'head']
    """
    short = []
    for name in map(str, layers):
        parts = name.split(".")
        for place in range(len(parts) - 1):
            if len(".".join(parts)) > MAX_CHARACTERS and not parts[place].isdigit():
                parts[place] = parts[place][:1]
        short.append(".".join(parts))
    return [new if short.count(new) == 1 else str(old) for new, old in zip(short, layers, strict=True)]


def whole_numbers() -> MaxNLocator:
    """Ticks at whole numbers of layers or steps."""
    return MaxNLocator("auto", integer=True, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])


def label_ends(ax: Axes, labels: Sequence[tuple[str, float, float, Color]]) -> None:
    """Write texts right of the Axes at the ends (text, x, y, color) of curves; every n-th if there is no room for all.

    The texts keep the order of the ends and do not overlap.
    """
    if not labels:
        return
    ax.autoscale_view()
    box, inverse = ax.get_window_extent(), ax.transAxes.inverted()
    probe = ax.text(0, 0, "Ag", fontsize="small")
    font = probe.get_fontproperties()
    probe.remove()
    line = text_size(["Ag"], font, ax)[1] * AIR
    while sum(line * (text.count("\n") + 1) for text, *_ in labels) > 1.1 * box.height and len(labels) > 2:
        labels = labels[::-2][::-1]
    ends = ax.transData.transform([(x, y) for _, x, y, _ in labels])
    sizes = [line * (text.count("\n") + 1) for text, *_ in labels]
    heights = spread_apart(ends[:, 1], sizes, (box.y0, box.y1))
    for (text, x, y, color), height in zip(labels, heights, strict=True):
        ax.annotate(
            text, (x, y), xytext=(1.02, inverse.transform((0, height))[1]), textcoords="axes fraction", va="center",
            fontsize="small", color=legible(color, ax), annotation_clip=False, zorder=1,
            arrowprops={**ARROW, "color": color},
        )  # fmt: skip


def spread_apart(places: npt.ArrayLike, sizes: npt.ArrayLike, within: tuple[float, float]) -> list[float]:
    """The centers of texts of these sizes, moved as little as possible until all lie apart and, if they fit, within.

    >>> spread_apart([3.0, 3.0, 9.0], [2.0, 2.0, 2.0], (0.0, 9.0))
    [2.0, 4.0, 8.0]
    """
    values, extent = np.asarray(places, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    offsets = np.cumsum(np.r_[0.0, (extent[order][1:] + extent[order][:-1]) / 2])
    # Without the offsets the places must only not decrease: isotonic regression by pooling neighbors.
    pools: list[tuple[float, int]] = []
    for value in values[order] - offsets:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, num_b), (a, num_a) = pools.pop(), pools.pop()
            pools.append(((a * num_a + b * num_b) / (num_a + num_b), num_a + num_b))
    low, high = within[0] + extent[order][0] / 2, within[1] - extent[order][-1] / 2 - offsets[-1]
    low, high = (low, high) if low <= high else ((low + high) / 2, (low + high) / 2)
    result = np.empty_like(values)
    result[order] = np.repeat([value for value, _ in pools], [num for _, num in pools]).clip(low, high) + offsets
    return result.tolist()


def legend(ax: Axes, handles: Sequence[Any] | None = None, *, beside: bool = False) -> Legend:
    """A legend in a corner without curves or texts; if there is none, the y axis is extended to make room above.

    A high legend stands ``beside`` the Axes, and names every n-th curve if there is no room for all.
    """
    ax.autoscale_view()
    size = FontProperties(size=plt.rcParams["legend.fontsize"]).get_size_in_points()
    room = max(20, int(1.7 * ax.get_window_extent().width * 72 / ax.figure.dpi / size) - 8)  # in characters
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    texts = [fill(str(handle.get_label()), NOTE_WIDTH if beside else room) for handle in handles]
    made = ax.legend(handles, texts)
    high = made.get_window_extent().height / ax.get_window_extent().height
    if not beside and high > MOST_SHARE:
        return legend(ax, handles, beside=True)
    if beside:
        step = int(np.ceil(high))
        return ax.legend(handles[::step], texts[::step], loc="upper left", bbox_to_anchor=(1.0, 1.0))
    drawn = [(line.get_path(), line.get_transform(), False) for line in ax.lines if len(line.get_path())]
    drawn += [(path, part.get_transform(), True) for part in ax.collections for path in part.get_paths()]
    paths = [(path.transformed(place).cleaned(remove_nans=True), filled) for path, place, filled in drawn]
    for corner in CORNERS:
        made.set_loc(corner)
        box = made.get_window_extent().expanded(1.04, 1.1)
        if not any(path.intersects_bbox(box, filled=filled) for path, filled in paths):
            return made
    made.set_loc("upper left")
    share = 1.1 * high + 0.03
    scale = ax.yaxis.get_transform()
    low, high = scale.transform(np.array(ax.get_ylim()))
    top = float(scale.inverted().transform(np.array([low + (high - low) / (1 - share)]))[0])
    if ax.get_autoscaley_on():  # Axes that share this axis may get curves later, so the limits stay free
        ax.update_datalim([(ax.dataLim.x0, top)], updatex=False)
        ax.autoscale_view(scalex=False)
    else:
        ax.set_ylim(top=top)
    return made


def key_handles(ax: Axes, colors: Mapping[str, dict[str, Any]], dashes: Mapping[str, Any]) -> list[Line2D]:
    """Handles of a legend: one per color, then one per kind of dashes; of many colors, about ten in equal steps."""
    step = max(1, len(colors) // 10) if len(colors) > 20 else 1
    shown = list(colors.items())[::step]
    own = [Line2D([], [], label=name, **style) for name, style in shown]
    return own + [Line2D([], [], label=name, color=ink(ax), linestyle=dash) for name, dash in dashes.items()]
