"""Heat maps: coefficients between all pairs of layers, and theory over a plane of variances."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from gradscope.choices import Finite, checked, require
from gradscope.meanfield import PhaseDiagram
from gradscope.plots.drawing import DIVERGING, CellText, axes, name_layers
from gradscope.plots.rows import LABELS, MEASURED, finite_limits, growth_table, one_network, rows_of

MAX_ANNOTATED = 12
LEAST_LIMIT = 0.05  # of log10 rates, so that the colors of stable networks are pale


@checked
def phase_diagram(diagram: PhaseDiagram, *, points: Any = None, ax: Axes | None = None) -> Axes:
    """Axes with a map of chi_1, the growth factor of squared gradients per layer, over weight and bias variance.

    A black line marks the critical points, where chi_1 = 1.  Measured networks are added as points.

    Arguments:
        diagram: What `gradscope.meanfield.phase_diagram` returns.
        points: Measured networks: a frame with one row per network and the columns ``weight_variance``,
            ``bias_variance`` and ``rate``.  Or a tidy frame of GSC with these two variances, from which the rates are
            computed.  With points, the color scale covers their rates.
        ax: Where to draw; a new figure by default.

    >>> import gradscope as gs
    >>> ax = phase_diagram(gs.meanfield.phase_diagram("tanh", [0.5, 1.5, 2.5], [0.0, 0.2]))
    >>> [float(end) for end in ax.get_xlim()]
    [0.5, 2.5]
    """
    ax = axes(ax, (6.4, 4.6))
    weight_variances, bias_variances, chi_1 = diagram.weight_variances, diagram.bias_variances, diagram.chi_1
    if points is not None:
        points = growth_table(points, ("weight_variance", "bias_variance"))
        require(points, ["weight_variance", "bias_variance", "rate"], "networks with these columns")
    scale = np.log10(chi_1 if points is None else points["rate"].to_numpy(dtype=np.float64))
    limit = max(float(np.nanmax(np.abs(scale))), LEAST_LIMIT)
    colors: dict[str, Any] = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    shown = ax.pcolormesh(weight_variances, bias_variances, np.log10(chi_1).T, shading="gouraud", **colors)
    lines = ax.contour(weight_variances, bias_variances, chi_1.T, levels=[1.0], colors="black", linewidths=1.5)
    ax.clabel(lines, fmt={1.0: r"$\chi_1 = 1$"}, fontsize="small")
    if points is not None:
        w, b, rates = (points[name] for name in ("weight_variance", "bias_variance", "rate"))
        edge: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.8, "zorder": 3, "clip_on": False}
        ax.scatter(w, b, c=np.log10(rates), s=60, **colors, **edge)
        for x, y, rate in zip(w, b, rates, strict=True):
            ax.annotate(
                f"{rate:.2f}",
                (x, y),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize="x-small",
                color="black",
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
    ax.figure.colorbar(shown, ax=ax, label=r"$\log_{10}$ of the GSC rate per layer", extend="both")
    ax.set(xlabel=r"weight variance $\sigma_w^2$", ylabel=r"bias variance $\sigma_b^2$")
    return ax


@checked
def matrix(
    data: Any, *, limits: tuple[Finite, Finite] | None = None, colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Axes with a heat map of log10 GSC from every source (column) to every target (row), averaged over seeds.

    Arguments:
        data: A `gradscope.Matrix`, a list of these (networks that differ in their seeds), or a tidy frame with rows of
            quantity "gsc" for several targets.  A `gradscope.Profile` gives one row.
        limits: Ends of the color scale, for panels that share a scale; by default from the data, symmetric about 0.
        colorbar: Whether to draw a color bar.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: The frame lacks a column or rows of quantity "gsc", or networks differ in more than their seeds.

    >>> import torch, gradscope as gs
    >>> measured = gs.gsc_matrix(gs.models.MLP(depth=2, width=8), torch.randn(16, 8))
    >>> [label.get_text() for label in matrix(measured).get_yticklabels()]
    ['input', 'layers.0', 'layers.1']
    """
    rows = rows_of(data, "gsc", "target", "log10_value", maker=MEASURED.replace("gsc(", "gsc_matrix("))
    one_network(rows)
    if rows["target"].nunique() > 1:
        rows = rows[rows["layer"].isin(rows["target"])]
    sources = rows.drop_duplicates("layer").sort_values("index", kind="stable")["layer"]
    targets = sources[sources.isin(rows["target"])]
    table = rows.pivot_table(index="target", columns="layer", values="log10_value", aggfunc="mean", observed=True)
    values = table.reindex(index=targets, columns=sources).to_numpy()
    low, high = limits or finite_limits(values, symmetric=True)
    new, square = ax is None, len(sources) == len(targets)
    ax = axes(ax, (5, 4.2), "compressed" if square else "constrained")  # only "compressed" knows of equal aspects
    shown = ax.pcolormesh(np.ma.masked_invalid(values), vmin=low, vmax=high, cmap=DIVERGING)
    ax.set(aspect="equal" if square else "auto", xlim=(0, len(sources)), ylim=(len(targets), 0))
    name_layers(ax.xaxis, np.arange(len(sources)) + 0.5, sources.tolist(), grow=new)
    name_layers(ax.yaxis, np.arange(len(targets)) + 0.5, targets.tolist(), grow=new)
    ax.tick_params(length=2)
    ax.spines[:].set_visible(False)
    if len(sources) <= MAX_ANNOTATED:
        cells = {
            cell: f"{value:.1f}".replace("-0.0", "0.0") for cell, value in np.ndenumerate(values) if value > -np.inf
        }
        for (row, column), text in cells.items():
            strong = abs(values[row, column] - (low + high) / 2) > 0.3 * (high - low)
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "x-small"}
            number = CellText(column + 0.5, row + 0.5, text, color="white" if strong else "0.15", **style)
            number.widest = max(cells.values(), key=len)
            ax.add_artist(number)
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, label=LABELS["gsc"])
    ax.set(xlabel="source layer $k$", ylabel="target layer $l$")
    return ax
