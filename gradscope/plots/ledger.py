"""The figure of a residual stream, from `gradscope.residual`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from gradscope.choices import checked
from gradscope.plots.drawing import DASHES, curve, ink, legend, name_layers, next_colors, reference
from gradscope.plots.rows import Z95, frame_of, rows_of
from gradscope.plots.training import MARKERS

LEDGER = "gradscope.residual(model, data).to_frame()"
MOST_KINDS = 6  # of writes that are distinguished
SHARES = {"skip_share": "skip", "branch_share": "branch", "cross_share": "cross term"}


@checked
def residual(data: Any, *, axes: Sequence[Axes] | None = None) -> tuple[Axes, ...]:
    """Three Axes that show the residual stream at every residual addition x + f(x), in execution order.

    - Top: the root mean squares of the stream x and of the write f(x).
    - Middle: the root mean square of the write divided by that of the stream.
    - Bottom: the shares of the squared Jacobian that pass through the skip and through the branch, and the size of
      their cross term.  Markers are hollow where the cross term is negative.

    Branches whose names differ only in numbers, such as "h.0.mlp" and "h.1.mlp", share one curve.  All vertical scales
    are logarithmic.  Bands are 95 % intervals, where standard errors are known.

    Arguments:
        data: A `gradscope.Residual`, or its frame.
        axes: Where to draw, three Axes; a new figure by default.

    Raises:
        ValueError: The frame lacks a column or a quantity, or holds several networks.

    >>> frame = pd.DataFrame({"layer": "mlp", "index": 1, "value": [1.0, 0.5, 0.5, 0.8, 0.1, 0.1]})
    >>> frame["quantity"] = ["stream_rms", "write_rms", "write_ratio", *SHARES]
    >>> frame[["log10_stderr_sample", "stderr_sample", "stderr_probe"]] = float("nan")
    >>> [ax.get_ylabel() for ax in residual(frame)]
    ['root mean square', 'write / stream', 'share of squared Jacobian']
    """
    frame = frame_of(data)
    if new := axes is None:
        axes = list(plt.subplots(3, 1, figsize=(7.6, 7.6), sharex=True, layout="constrained")[1])
    if len(axes) != 3:
        raise ValueError(f"axes must be three Axes, got {len(axes)}.")
    lengths, ratios, shares = axes
    stream, writes, ratio = (_rows(frame, name) for name in ("stream_rms", "write_rms", "write_ratio"))
    curve(lengths, stream["index"], stream, color=ink(lengths), linestyle="-", label="stream")
    kinds = _kinds(stream["layer"].tolist())
    colors = next_colors(lengths, len(set(kinds.values())))
    for kind, color, marker in zip(dict.fromkeys(kinds.values()), colors, itertools.cycle(MARKERS), strict=False):
        for ax, rows in ((lengths, writes), (ratios, ratio)):
            own = rows[rows["layer"].map(kinds) == kind]
            curve(ax, own["index"], own, **{**color, "marker": marker, "markersize": 4, "label": kind})
    for (quantity, label), color, dash in zip(SHARES.items(), next_colors(shares, 3), DASHES, strict=False):
        rows = _rows(frame, quantity)
        style = {**color, "linestyle": dash, "marker": "o", "markersize": 4}
        curve(shares, rows["index"], rows, **style, label=label)
        if (negative := rows[rows["value"] < 0]).size:
            hollow = {**style, "linestyle": "none", "markerfacecolor": shares.get_facecolor()}
            shares.plot(negative["index"], negative["mean"], **hollow, label=f"{label}, negative")
    reference(shares, y=1)
    for ax, label in zip(axes, ("root mean square", "write / stream", "share of squared Jacobian"), strict=True):
        ax.set(yscale="log", ylabel=label)
    name_layers(shares.xaxis, stream["index"].to_numpy(), stream["layer"].tolist(), grow=new)
    for ax in (lengths, shares):
        legend(ax, beside=True)
    return tuple(axes)


def _rows(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of a quantity with ``mean`` and the ends ``low`` and ``high`` of intervals, null if unknown.

    The error over samples contains that of the probes.  If it is unknown, the interval is for these samples alone.
    """
    needed = ("value", "log10_stderr_sample", "stderr_sample", "stderr_probe")
    rows = rows_of(frame, quantity, *needed, maker=LEDGER).sort_values("index")
    if rows["index"].duplicated().any():
        raise ValueError(f"The frame holds several rows of {quantity!r} for an addition: draw one network at a time.")
    value = rows["value"]
    if quantity in SHARES:
        size, margin = value.abs(), Z95 * rows["stderr_sample"].fillna(rows["stderr_probe"])
        return rows.assign(mean=size, low=size - margin, high=size + margin)
    factor = 10 ** (Z95 * rows["log10_stderr_sample"])
    return rows.assign(mean=value, low=value / factor, high=value * factor)


def _kinds(names: Sequence[str]) -> dict[str, str]:
    """The kind of each write: what its name has besides numbers, without the parts that all kinds share.

    >>> _kinds(["h.0.attn", "h.0.mlp", "h.1.attn"])
    {'h.0.attn': 'attn', 'h.0.mlp': 'mlp', 'h.1.attn': 'attn'}
    """
    patterns = {name: [re.sub(r"\d+", "*", part) for part in name.split(".")] for name in names}
    columns = zip(*(parts[:-1] for parts in patterns.values()), strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    kinds = {name: ".".join(parts[shared:]) for name, parts in patterns.items()}
    return kinds if len(set(kinds.values())) <= MOST_KINDS else dict.fromkeys(names, "write")
