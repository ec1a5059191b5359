"""Curves of coefficients and statistics against depth."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from numbers import Number
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from gradscope.choices import checked, require, shown
from gradscope.coefficients.growth import trunk_of
from gradscope.frames import NETWORK
from gradscope.meanfield import Prediction
from gradscope.plots.drawing import (
    DASHES,
    NOTE_WIDTH,
    axes,
    curve,
    ink,
    key_handles,
    label_ends,
    legend,
    name_layers,
    next_colors,
    reference,
    whole_numbers,
)  # fmt: skip
from gradscope.plots.rows import LABELS, curve_names, growth_words, gsc_rows, hue_of, rows_of, summary

MAX_DIRECT_LABELS = 8
MAX_NAMED_LAYERS = 24  # with more layers, `profile` shows more than `named_profile`
MARKERS = "os^Dv"
NUM_MARKERS = 12  # a predicted curve has about this many markers


@checked
def profile(
    data: Any, *, hue: str | None = None, style: str | None = None,
    notes: Mapping[tuple[str, ...], str] | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with log10 GSC of every layer with respect to the last target, against the number of layers to this target.

    A `gradscope.Matrix` has several targets; usually, the last one is the output.  Lines are means over seeds; bands
    are one standard deviation between seeds.  With one seed, bands are the 95 % intervals of the values.  If there are
    at most eight curves, each label holds the growth rate and its verdict; see `gradscope.Growth`.

    Arguments:
        data: A `gradscope.Profile`, a `gradscope.Matrix`, or a tidy frame with rows of quantity "gsc" (or
            "parameter_gsc").  Networks that differ only in their seeds are given as a list of these.  A dict maps
            names of networks to any of these.
        hue, style: Columns that determine the color and the dashes of a curve.  By default, ``hue`` is the one column
            that distinguishes the networks, such as ``network`` for a dict.
        notes: Texts to add to the labels of curves, in place of growth rate and verdict: a dict from tuples to texts.
            The tuple of a curve holds its values in the columns ``hue`` and ``style``, such as ``("tanh",)``.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: The frame lacks a column or rows of GSC, or columns other than ``seed`` vary within a curve.

    >>> import torch, gradscope as gs
    >>> measured = gs.gsc(gs.models.MLP(depth=3, width=8), torch.randn(16, 8))
    >>> profile(measured).get_xlabel()
    "layers to 'layers.2'"
    """
    rows = trunk_of(gsc_rows(data))
    targets: list[str] = rows["target"].dropna().unique().tolist() if "target" in rows else []
    label = f"layers to {targets[0]!r}" if len(targets) == 1 else LABELS["depth_from_output"]
    ax = _curves(rows, "depth_from_output", "log10_value", hue, style, ax, notes=notes, grows=True)
    ax.set(xlabel=label, ylabel=LABELS[rows["quantity"].iloc[0]])
    return ax


@checked
def named_profile(
    data: Any, *, hue: str | None = None, notes: Mapping[tuple[str, ...], str] | None = None, ax: Axes | None = None
) -> Axes:
    """Axes with the log10 GSC curves of `profile`, against the names of the layers in execution order.

    Takes the arguments of `profile` except ``style``, and raises the same exceptions.  Names of layers for which there
    is no room are left out.

    >>> import torch, gradscope as gs
    >>> measured = gs.gsc(gs.models.MLP(depth=2, width=8), torch.randn(16, 8))
    >>> [label.get_text() for label in named_profile(measured).get_xticklabels()]
    ['input', 'layers.0', 'layers.1']
    """
    rows = gsc_rows(data)
    names = rows.drop_duplicates("layer").sort_values("index", kind="stable")["layer"].tolist()
    rows = rows.assign(_place=rows["layer"].map(dict(zip(names, range(len(names)), strict=True))).astype(int))
    drawn = _curves(rows, "_place", "log10_value", hue, None, ax, marker="o", notes=notes, grows=True)
    name_layers(drawn.xaxis, range(len(names)), names, grow=ax is None)
    drawn.set(xlabel="", ylabel=LABELS[rows["quantity"].iloc[0]])
    return drawn


@checked
def theory(predicted: Any, keys: Sequence[str] = (NETWORK,), *, ax: Axes) -> Axes:
    """Add predicted log10 GSC to the Axes of `profile`, and return the Axes.

    Predictions are thin lines with markers.  Their color is that of the measured curve of the same name.

    Arguments:
        predicted: A `gradscope.meanfield.Prediction`, a dict from names of networks to predictions, or a frame.  The
            frame has the columns ``depth_from_output`` and ``log10_value``, and the columns that ``keys`` names.
        keys: Names of one or two columns.  The first determines the color, the second the shape of the markers.

    >>> predicted = pd.DataFrame({"depth_from_output": [0, 1], "log10_value": [0.0, 0.2], "activation": "tanh"})
    >>> ax = theory(predicted, ["activation"], ax=axes(None))
    >>> ax.get_legend().get_texts()[0].get_text()
    'mean field'
    """
    if not keys:
        raise ValueError("keys must name at least one column.")
    if not isinstance(predicted, pd.DataFrame):
        each = predicted if isinstance(predicted, Mapping) else {"": predicted}
        if not each or not all(isinstance(one, Prediction) for one in each.values()):
            raise TypeError(f"predicted must be a Prediction, a dict of these, or a frame, got {shown(predicted)}.")
        predicted = pd.concat(
            pd.DataFrame({"log10_value": one.log10_gsc[::-1], NETWORK: str(name)}).reset_index(
                names="depth_from_output"
            )
            for name, one in each.items()
        )
    require(predicted, ["depth_from_output", "log10_value", *keys], "predictions with these columns")
    drawn = [line for line in ax.lines if line.get_gid() is not None]
    colors = {line.get_gid(): line.get_color() for line in drawn}
    if len(colors) == 1 and predicted[keys[0]].nunique() == 1:
        colors = dict.fromkeys(predicted[keys[0]].astype(str), drawn[0].get_color())
    shapes: dict[str, str] = {}
    thin: dict[str, Any] = {"linewidth": 0.6, "markersize": 5, "markerfacecolor": "none"}
    for names, rows in predicted.groupby(list(keys), sort=False, observed=True):
        style = str(names[1]) if keys[1:] else "none"
        label = "mean field" if style == "none" else f"mean field, {style}"
        if str(names[0]) not in colors:
            colors[str(names[0])] = next_colors(ax, 1)[0]["color"]
        ax.plot(
            rows["depth_from_output"], rows["log10_value"], color=colors[str(names[0])],
            marker=shapes.setdefault(label, MARKERS[len(shapes) % len(MARKERS)]), linestyle="-",
            markevery=max(1, len(rows) // NUM_MARKERS), zorder=1.5, label=label, **thin,
        )  # fmt: skip
    own = ax.get_legend()
    old = [] if own is None else list(own.legend_handles)
    new = [Line2D([], [], color=ink(ax), marker=shape, label=label, **thin) for label, shape in shapes.items()]
    legend(ax, [handle for handle in (*old, *new) if handle is not None])
    return ax


@checked
def statistic(
    data: Any, quantity: str, *, log10: bool = False, hue: str | None = None, style: str | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with a statistic of each layer, such as "sign_diversity", against the layer's index from the input.

    Takes the arguments of `profile` except ``notes``, and raises the same exceptions.  But ``data`` must have rows of
    ``quantity``, as a frame of `gradscope.measure` has.  With one seed, a band shows the value plus and minus 1.96
    standard errors.  With ``log10``, the logarithm of the statistic is drawn where it is finite.

    >>> import torch, gradscope as gs
    >>> frame = gs.measure(gs.models.MLP(depth=3, width=8), torch.randn(16, 8))
    >>> statistic(frame, "sign_diversity").get_ylabel()
    'sign diversity'
    """
    column = "log10_value" if log10 else "value"
    rows, label = rows_of(data, quantity, column), LABELS.get(quantity, quantity.replace("_", " "))
    if log10:
        rows = rows[np.isfinite(rows[column])]
    bottom = 0.0 if not log10 and (rows[column].dropna() >= 0).all() else None
    ax = _curves(rows, "index", column, hue, style, ax, bottom=bottom)
    ax.set(xlabel=LABELS["index"], ylabel=rf"$\log_{{10}}$ {label}" if log10 else label)
    return ax


def _curves(
    rows: pd.DataFrame, x: str, y: str, hue: str | None, style: str | None, ax: Axes | None,
    marker: str = "None", notes: Mapping[tuple[str, ...], str] | None = None, grows: bool = False,
    bottom: float | None = None,
) -> Axes:  # fmt: skip
    """Axes with mean lines and bands; up to `MAX_DIRECT_LABELS` curves are labeled at their ends."""
    hue = hue_of(rows, hue, style, free=("_place",))
    parts = curve_names(hue, style, rows)
    few = len(parts) <= MAX_DIRECT_LABELS
    if notes is None:
        notes = {name: growth_words(part) for name, part in parts.items()} if grows and few else {}
    ax = axes(ax, (6.4 if len(parts) == 1 else 8.2, 4.2))
    hues = list(dict.fromkeys(name[0] for name in parts)) if hue else [""]
    colors = dict(zip(hues, next_colors(ax, len(hues)), strict=True))
    styles = list(dict.fromkeys(name[-1] for name in parts)) if style else []
    dashes = dict(zip(styles, itertools.cycle(DASHES), strict=False))
    ends = []
    for name, part in parts.items():
        points = summary(part, x, y)
        own = {**colors[name[0] if hue else ""], **({"linestyle": dashes[name[-1]]} if style else {}), "linewidth": 1.8}
        if marker != "None":
            own["marker"] = marker
        text = _label(name, (hue, style), part, notes.get(name, ""), points)
        line = curve(ax, points[x], points, faint=not few, gid=name[0] if hue else "", label=text or None, **own)
        last = points.dropna(subset="mean")
        if len(last):
            ends.append(
                (fill(text, NOTE_WIDTH), float(last[x].iloc[-1]), float(last["mean"].iloc[-1]), line.get_color())
            )
    if grows:
        reference(ax, y=0)
    if bottom is not None:
        ax.set_ylim(bottom=bottom)
    ax.xaxis.set_major_locator(whole_numbers())
    if not few:
        handles = key_handles(ax, {_word(hue, name, rows): own for name, own in colors.items()} if hue else {}, dashes)
        legend(ax, handles, beside=True)
    elif len(parts) > 1:
        label_ends(ax, ends)
    elif any(not str(line.get_label()).startswith("_") for line in ax.lines):
        legend(ax)
    return ax


def _label(
    name: tuple[str, ...], keys: tuple[str | None, str | None], rows: pd.DataFrame, note: str, points: pd.DataFrame
) -> str:
    """The label of a curve: its values of hue and style, a note, and the number of layers that are zero."""
    own = zip([key for key in keys if key is not None], name, strict=True)
    parts = [("+".join(_word(key, part, rows) for key, part in own if part != "none") or "none") if name else "", note]
    if zeros := int((points["zeros"] > 0).sum()):
        parts.append(f"zero in {zeros} of {len(points)} layers")
    return ": ".join(parts[:1] * bool(parts[0]) + ["; ".join(part for part in parts[1:] if part)]).removesuffix(": ")


def _word(key: str | None, value: str, rows: pd.DataFrame) -> str:
    """The value of a column as text, together with the name of the column if the value is a number."""
    return f"{key} {value}" if key and isinstance(rows[key].iloc[0], Number) else value
