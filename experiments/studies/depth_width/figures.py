"""Figures of the study of depth and width."""

from __future__ import annotations

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.colors import COLORS
from experiments.evidence.means import Mean, errorbars, geometric_mean, mean
from experiments.studies.depth_width.measurement import TOLERANCE
from experiments.studies.depth_width.numbers import Rates, all_rates, name, theory

DASHED = (0, (4, 2.5))
MARKERS = "os^DvPX"


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of the rates of all sizes, of deviations from mean field, and of the profiles of two networks."""
    found = all_rates(collected)
    return {"rates": rates(found), "width": deviations(found), "profiles": profiles(collected.frame)}


def rates(found: dict[str, Rates]) -> Figure:
    """Rates of all sizes, one panel per network, with the tolerance around the rate of the largest network."""
    figure, axes = plt.subplots(2, 4, figsize=(12.4, 6.4), layout="constrained")
    half = 1.1 * max(_reach(own) for own in found.values())
    for ax, (network, own) in zip(axes.flat, found.items(), strict=False):
        _draw_sizes(ax, own)
        ax.set_ylim(own.largest.value * math.exp(-half), own.largest.value * math.exp(half))
        ax.set_title(name(network), fontsize=10)
    for ax in axes.flat[len(found) :]:
        ax.set_axis_off()
    for ax in axes[:, 0]:
        ax.set_ylabel("GSC rate per layer (squared)")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=10)
    num_seeds = len(next(iter(found.values())).values)
    figure.suptitle(f"Rates of nine sizes; mean over {num_seeds} seeds, bars: 95 % interval", fontsize=11)
    return figure


def _cells(own: Rates) -> list[Mean]:
    return [geometric_mean(column) for column in own.values.reshape(len(own.values), -1).T]


def _reach(own: Rates) -> float:
    """How far the figure must reach around the largest network, so that it shows all intervals and mean field."""
    ends = [end for cell in _cells(own) for end in (cell.low, cell.high)] + [own.theory]
    return max(abs(math.log(end / own.largest.value)) for end in ends)


def _draw_sizes(ax: Axes, own: Rates) -> None:
    low, high = (own.largest.value * math.exp(end) for end in (-TOLERANCE, TOLERANCE))
    ax.axhspan(low, high, color="0.9", zorder=0, label=f"largest network, log rate $\\pm$ {TOLERANCE:g}")
    ax.axhline(own.theory, color="0.15", linewidth=0.9, linestyle=DASHED, label="mean field")
    places, cells = np.arange(len(own.depths)), _cells(own)
    lines: dict[str, Any] = {"linewidth": 0.8, "elinewidth": 1.4, "markersize": 5, "capsize": 2}
    for number, (color, width) in enumerate(zip(COLORS, own.widths, strict=False)):
        style = lines | {"fmt": f"{MARKERS[number]}-", "color": color, "label": f"width {width}"}
        errorbars(ax, places + 0.16 * (number - 1), cells[number :: len(own.widths)], **style)
    ax.set_xticks(places, [str(depth) for depth in own.depths])
    ax.set_xlabel("depth")
    sns.despine(ax=ax)


def deviations(found: dict[str, Rates]) -> Figure:
    """Log rates minus the log rate of mean field, against 1 / width."""
    figure, ax = plt.subplots(figsize=(7.4, 4.8), layout="constrained")
    widths = next(iter(found.values())).widths
    for number, (color, (network, own)) in enumerate(zip(COLORS, found.items(), strict=False)):
        known = math.log(own.theory)
        cells = [mean(column) for column in own.logs.mean(axis=1).T - known]
        beside = 0.00012 * (number - 3)
        at = np.array([1 / width for width in widths]) + beside
        end, slope = own.lines.mean(axis=0) - [known, 0]
        ax.plot([beside, 1 / widths[0] + beside], [end, end + slope / widths[0]], color=color, linewidth=0.8)
        errorbars(ax, at, cells, label=name(network), fmt=MARKERS[number], color=color, markersize=5, capsize=2)
    ax.axhline(0, color="0.15", linewidth=0.9, linestyle=DASHED)
    ax.set_xticks([0, *(1 / width for width in reversed(widths))], [r"$\infty$", *map(str, reversed(widths))])
    ax.set(xlabel="width (linear in 1 / width)", ylabel="log rate per layer, minus mean field")
    num_seeds = len(next(iter(found.values())).values)
    about = f"mean over depths and {num_seeds} seeds, bars: 95 % interval, lines: least squares"
    ax.set_title(f"Deviation from mean field\n{about}", fontsize=10)
    ax.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    sns.despine(ax=ax)
    return figure


def profiles(frame: pd.DataFrame) -> Figure:
    """Difference between log GSC and the straight line of mean field, for all sizes of two networks."""
    networks, depths = ("selu", "relu_batch"), sorted(frame["depth"].unique())
    figure, axes = plt.subplots(2, len(depths), figsize=(12.0, 6.6), layout="constrained", sharex="col", sharey="row")
    for row, network in zip(axes, networks, strict=True):
        rows = frame[(frame["model"] == network) & (frame["quantity"] == "gsc")]
        rate = theory(rows)
        sizes = rows.groupby(["width", "depth", "depth_from_output"], observed=True)["log10_value"]
        found = sizes.apply(mean).unstack()
        for ax, depth in zip(row, depths, strict=True):
            for color, marker, width in zip(COLORS, MARKERS, sorted(rows["width"].unique()), strict=False):
                cells = found.loc[(width, depth)].dropna()
                away = cells.index.to_numpy(dtype=float)
                low, value, high = np.array([[c.low, c.value, c.high] for c in cells]).T - away * math.log10(rate)
                ax.fill_between(away, low, high, color=color, alpha=0.15, linewidth=0)
                ax.plot(away, value, f"{marker}-", color=color, linewidth=1, markersize=4, label=f"width {width}")
            ax.axhline(0, color="0.15", linewidth=0.9)
            ax.set_title(f"{name(network)}, depth {depth}", fontsize=10)
            sns.despine(ax=ax)
        row[0].set_ylabel(rf"$\log_{{10}}$ GSC (squared), minus mean field" f"\n({rate:.4f} per layer)")
    for ax in axes[-1]:
        ax.set_xlabel("layers to the output")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    seeds = f"mean over {frame['seed'].nunique()} seeds, bands: 95 % interval of the mean"
    figure.suptitle(f"Nine sizes of two networks; {seeds}", fontsize=11)
    return figure
