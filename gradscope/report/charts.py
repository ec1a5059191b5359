"""Charts of the page: tidy numbers to specifications of Vega, which the page draws without a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import altair as alt

Spec = dict[str, Any]

# Readable on white and on black, and with common kinds of color blindness; dashes and shapes say the same.
COLORS = ("#3182bd", "#d55e00", "#009e73", "#c0599a", "#8c7a1f", "#8064c8", "#7f7f7f", "#c03030")
MEASURED, THEORY = "measured", "mean-field theory"
GSC_TITLE = "log10 GSC (squared, no unit)"
DEPTH_TITLE = "number of layers to the target"
NAMES_TITLE = "layer, from the target (left) to the input"
FEW_LAYERS = 24  # up to this many layers, the axis names them
NAME_WIDTH = 95  # of a layer's name along an axis, in pixels
NAME_LENGTH = 13  # of such a name, in characters


@cache
def javascript() -> str:
    """Return Vega-Embed with Vega as a script without dependencies; the first call takes seconds."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def short(name: str) -> str:
    """Return the last parts of a name, which tell layers apart, for an axis.

    >>> short("transformer.h.0"), short("layers.1"), short("normalization_of_layer")
    ('…h.0', 'layers.1', '…ion_of_layer')
    """
    if len(name) <= NAME_LENGTH:
        return name
    end = name[1 - NAME_LENGTH :]
    return f"…{end if name[-NAME_LENGTH] == '.' else end.partition('.')[2] or end}"


def curves(rows: pd.DataFrame, *, names: Sequence[str] = ()) -> Spec:
    """Return curves of log10 GSC against depth with bands, one color per network, dashes for theory.

    Arguments:
        rows: Columns network, kind (`MEASURED` or `THEORY`), layer, depth, log10, low, high; low and high may be null.
        names: Names of the layers at depths 0, 1, ... for the axis; by default the axis shows numbers.
    """
    import altair as alt

    rows = rows[np.isfinite(rows["log10"])]
    several, theory = rows["network"].nunique() > 1, (rows["kind"] == THEORY).any()
    ticks: dict[str, Any] = {"labelAngle": 0}
    if names:
        label = f"{json.dumps([short(name) for name in names])}[datum.value]"
        ticks = {"labelAngle": -45, "values": list(range(len(names))), "labelExpr": label}
    axis = alt.Axis(labelLimit=NAME_WIDTH, tickMinStep=1, grid=False, **ticks)
    x = alt.X("depth:Q", title=NAMES_TITLE if names else DEPTH_TITLE, axis=axis, scale=alt.Scale(nice=False, padding=8))
    y = alt.Y("log10:Q", title=GSC_TITLE, scale=alt.Scale(zero=False))
    legend: dict[str, Any] = {"orient": "top", "title": None, "labelLimit": 0, "columns": 2, "symbolOpacity": 1}
    kinds = [MEASURED, THEORY]
    by_network = alt.Color("network:N", sort=None, scale=alt.Scale(range=list(COLORS)), legend=alt.Legend(**legend))
    gray: dict[str, Any] = {"symbolFillColor": "#888888", "symbolStrokeColor": "#888888"} if several else {}
    kind_legend = alt.Legend(**legend, **gray) if theory else None
    by_kind = alt.Color("kind:N", scale=alt.Scale(domain=kinds, range=list(COLORS[:2])), legend=kind_legend)
    color = by_network if several else by_kind
    dash = alt.StrokeDash("kind:N", legend=kind_legend, scale=alt.Scale(domain=kinds, range=[[1, 0], [5, 4]]))
    shape = alt.Shape("kind:N", legend=kind_legend, scale=alt.Scale(domain=kinds, range=["circle", "diamond"]))
    tooltip = [
        *(["network:N"] if several else []), alt.Tooltip("layer:N"), alt.Tooltip("kind:N"),
        alt.Tooltip("depth:Q", title="layers to the target"), _number("log10:Q", "log10 GSC"),
        _number("low:Q", "lower end"), _number("high:Q", "upper end"),
    ]  # fmt: skip
    base = alt.Chart(rows).encode(x=x, color=color)
    zero = alt.Chart(pd.DataFrame({"log10": [0.0]})).mark_rule(color="#888888").encode(y="log10:Q")
    band = base.transform_filter(alt.datum.kind == MEASURED).mark_area(opacity=0.25, aria=False)
    size = 40 if rows["depth"].nunique() <= FEW_LAYERS else 14
    return _spec(
        zero,
        band.encode(y=alt.Y("low:Q", title=GSC_TITLE), y2="high:Q"),
        base.mark_line(strokeWidth=2, aria=False).encode(y=y, strokeDash=dash),
        base.mark_point(size=size, filled=True, opacity=1).encode(y=y, shape=shape, tooltip=tooltip),
        height=340,
    )


def heat_map(table: pd.DataFrame, row: str, column: str) -> Spec:
    """Return a heat map of a table of log10 GSC, whose numbers the page reads from the HTML table beside it."""
    import altair as alt

    finite = table.to_numpy(dtype=float)
    finite = finite[np.isfinite(finite)]
    largest = float(np.abs(finite).max()) if finite.size and np.abs(finite).max() > 0 else 1.0
    longer = {name: short(name) for name in map(str, (*table.index, *table.columns)) if len(name) > NAME_LENGTH}
    label: dict[str, Any] = {"labelExpr": f"{json.dumps(longer)}[datum.value] || datum.label"} if longer else {}
    axis = alt.Axis(labelLimit=NAME_WIDTH, labelOverlap="greedy", labelSeparation=4, ticks=False, grid=False, **label)
    rows, columns = (alt.Scale(domain=list(map(str, names))) for names in (table.index, table.columns))
    chart = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect(aria=False)
        .encode(
            x=alt.X("column:N", title=column, scale=columns, axis=axis),
            y=alt.Y("row:N", title=row, scale=rows, axis=axis),
            color=alt.Color(
                "log10:Q", title=["log10", "GSC"],
                scale=alt.Scale(scheme="blueorange", domain=[-largest, largest]),
                legend=alt.Legend(gradientLength=160),
            ),
            tooltip=[
                alt.Tooltip("row:N", title=row), alt.Tooltip("column:N", title=column),
                alt.Tooltip("log10:Q", title="log10 GSC"),
            ],
        )
    )  # fmt: skip
    return _spec(chart, height=min(560, max(160, 24 * len(table))))


def rates(growth: pd.DataFrame) -> Spec:
    """Return growth rates with 95 % intervals, one line per network; shapes show verdicts, and crosses theory."""
    import altair as alt

    growth = growth[growth["rate"].notna()]
    y = alt.Y("network:N", sort=None, title=None, axis=alt.Axis(labelLimit=180, grid=True))
    x: dict[str, Any] = {"title": "growth rate of GSC per layer (squared, no unit)", "scale": alt.Scale(zero=False)}
    known = ["exploding", "vanishing", "stable", "undecided"]
    shapes = ["triangle-up", "triangle-down", "circle", "square"]
    legend = alt.Legend(orient="top", title=None)
    color = alt.Color(
        "verdict:N", scale=alt.Scale(domain=known, range=["#d55e00", "#3182bd", "#009e73", "#7f7f7f"]), legend=legend
    )
    shape = alt.Shape("verdict:N", scale=alt.Scale(domain=known, range=shapes), legend=legend)
    tooltip = [
        "network:N", "verdict:N", _number("rate:Q", "rate"), _number("rate_low:Q", "lower end"),
        _number("rate_high:Q", "upper end"), _number("theory:Q", THEORY),
    ]  # fmt: skip
    base = alt.Chart(growth).encode(y=y, color=color)
    one = alt.Chart(pd.DataFrame({"rate": [1.0]})).mark_rule(color="#888888").encode(x="rate:Q")
    layers = [
        one,
        base.mark_rule(strokeWidth=2, aria=False).encode(x=alt.X("rate_low:Q", **x), x2="rate_high:Q"),
        base.mark_point(size=60, filled=True, opacity=1).encode(x=alt.X("rate:Q", **x), shape=shape, tooltip=tooltip),
    ]
    if growth["theory"].notna().any():
        cross = alt.Chart(growth[growth["theory"].notna()]).mark_text(text="×", fontSize=18, aria=False)
        layers.append(cross.encode(x=alt.X("theory:Q", **x), y=y))
    return _spec(*layers, height=max(60, 20 * len(growth)))


def distances(rows: pd.DataFrame) -> Spec:
    """Return the distances of layers as points, one shape per kind, and what rounding explains as bars.

    Arguments:
        rows: Columns layer, index, kind, distance and rounding; those with distance 0 are not drawn.
    """
    import altair as alt

    x = alt.X("index:Q", title="layer, from the input", axis=alt.Axis(grid=False, tickMinStep=1))
    title, scale = "relative distance (no unit)", alt.Scale(type="log")
    legend = alt.Legend(orient="top", title=None, labelLimit=0)
    tooltip = ["layer:N", "kind:N", _number("distance:Q", "distance"), _number("rounding:Q", "rounding")]
    bars = alt.Chart(rows[rows["rounding"] > 0]).mark_tick(color="#888888", thickness=2, aria=False)
    points = alt.Chart(rows[rows["distance"] > 0]).mark_point(size=50, filled=True, opacity=1)
    color = alt.Color("kind:N", sort=None, scale=alt.Scale(range=list(COLORS[:2])), legend=legend)
    return _spec(
        bars.encode(x=x, y=alt.Y("rounding:Q", title=title, scale=scale)),
        points.encode(
            x=x, y=alt.Y("distance:Q", title=title, scale=scale), color=color,
            shape=alt.Shape("kind:N", sort=None, legend=legend), tooltip=tooltip,
        ),
        height=300,
    )  # fmt: skip


def _number(field: str, title: str) -> alt.Tooltip:
    import altair as alt

    return alt.Tooltip(field, title=title, format=".5~g")


def _spec(*layers: alt.Chart, height: int) -> Spec:
    """Return the specification of Vega for charts on top of each other, as wide as their place on the page."""
    import altair as alt

    chart = alt.layer(*layers).properties(width="container", height=height)
    chart = chart.configure(background="transparent", font="system-ui, sans-serif").configure_view(stroke=None)
    chart = chart.configure_axis(titleFontWeight="normal", labelFontSize=12, titleFontSize=12)
    return chart.configure_legend(labelFontSize=12, titleFontWeight="normal", titleFontSize=12).to_dict(format="vega")
