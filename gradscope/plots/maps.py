"""Heat maps: coefficients between all pairs of layers, and theory over a plane of variances."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from gradscope.plots.rows import DIVERGING, LABELS, axes, rows_of, thinned

MAX_ANNOTATED = 12


def phase_diagram(
    weight_variances: npt.ArrayLike, bias_variances: npt.ArrayLike, chi_1: npt.NDArray[np.float64], *,
    points: pd.DataFrame | None = None, ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Axes with chi_1 against weight and bias variance, the critical line chi_1 = 1, and measured networks.

    ``chi_1[i, j]`` belongs to ``weight_variances[i]`` and ``bias_variances[j]``.  ``points`` has one row per measured
    network, with columns ``weight_variance``, ``bias_variance`` and ``rate``; if given, the rates set the color scale.

    >>> import gradscope as gs
    >>> diagram = gs.meanfield.phase_diagram("tanh", [0.5, 1.5, 2.5], [0.0, 0.2])
    >>> ax = phase_diagram(diagram.weight_variances, diagram.bias_variances, diagram.chi_1)
    >>> [float(end) for end in ax.get_xlim()]
    [0.5, 2.5]
    """
    ax = axes(ax, (6.4, 4.6))
    scale = np.log10(chi_1 if points is None else points["rate"].to_numpy(dtype=np.float64))
    limit = float(np.nanmax(np.abs(scale)))
    colors: dict[str, Any] = {"cmap": DIVERGING, "vmin": -limit, "vmax": limit}
    shown = ax.pcolormesh(weight_variances, bias_variances, np.log10(chi_1).T, shading="gouraud", **colors)
    lines = ax.contour(weight_variances, bias_variances, chi_1.T, levels=[1.0], colors="black", linewidths=1.5)
    ax.clabel(lines, fmt={1.0: r"$\chi_1 = 1$"}, fontsize=9)
    if points is not None:
        w, b, rates = (points[name] for name in ("weight_variance", "bias_variance", "rate"))
        edge: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.8, "zorder": 3, "clip_on": False}
        ax.scatter(w, b, c=np.log10(rates), s=60, **colors, **edge)
        for x, y, rate in zip(w, b, rates, strict=True):
            ax.annotate(f"{rate:.2f}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=7)
    ax.figure.colorbar(shown, ax=ax, label=r"$\log_{10}$ growth of GSC per layer")
    ax.set(xlabel=r"weight variance $\sigma_w^2$", ylabel=r"bias variance $\sigma_b^2$")
    return ax


def matrix(
    frame: pd.DataFrame, *, limits: tuple[float, float] | None = None, colorbar: bool = True, ax: Axes | None = None
) -> Axes:
    """Axes with a heat map of log10 GSC from every source (column) to every target (row), averaged over runs.

    Arguments:
        frame: Tidy frame with rows of quantity "gsc" for several targets.
        limits: Ends of the color scale, for several panels with one scale; by default from the data, symmetric about 0.
        colorbar: Whether to draw a color bar.
        ax: Where to draw; a new figure by default.

    Raises:
        ValueError: The frame has no rows of quantity "gsc".

    >>> import torch, gradscope as gs
    >>> measured = gs.gsc_matrix(gs.models.MLP(depth=2, width=8), torch.randn(16, 8))
    >>> [label.get_text() for label in matrix(measured.to_frame()).get_yticklabels()]
    ['input', 'layers.0', 'layers.1']
    """
    rows = rows_of(frame, "gsc")
    rows = rows[rows["layer"].isin(rows["target"])]
    order = rows.drop_duplicates("layer").sort_values("index")["layer"]
    table = rows.pivot_table(index="target", columns="layer", values="log10_value", aggfunc="mean", observed=True)
    values = table.reindex(index=order, columns=order).to_numpy()
    largest = float(np.nanmax(np.abs(values))) or 1.0
    low, high = limits or (-largest, largest)
    ax = axes(ax, (5, 4.2))
    centers, names = np.arange(len(order)) + 0.5, thinned(order)
    shown = ax.pcolormesh(np.ma.masked_invalid(values), vmin=low, vmax=high, cmap=DIVERGING)
    ax.set(aspect="equal", ylim=(len(order), 0))
    ax.set_xticks(centers, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set_yticks(centers, names, fontsize=8)
    ax.tick_params(length=2)
    sns.despine(ax=ax, left=True, bottom=True)
    if len(order) <= MAX_ANNOTATED:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                strong = abs(value - (low + high) / 2) > 0.3 * (high - low)
                ax.text(
                    column + 0.5, row + 0.5, f"{value:.1f}".replace("-0.0", "0.0"), ha="center", va="center",
                    fontsize=7, color="white" if strong else "0.15",
                )  # fmt: skip
    if colorbar:
        ax.figure.colorbar(shown, ax=ax, label=LABELS["gsc"])
    ax.set(xlabel="source layer $k$", ylabel="target layer $l$")
    return ax
