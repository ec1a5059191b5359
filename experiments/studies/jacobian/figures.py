"""Figures of the study jacobian."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.studies.jacobian import numbers
from experiments.studies.jacobian.measurement import STEPS
from experiments.studies.jacobian.numbers import DEEP

WORDS = {
    "log_qm_norm": "quadratic mean", "mean_log_singular_value": "geometric mean",
    "mean_log_of_most": "geometric mean of all but the largest tenth",
}  # fmt: skip


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of the grid, of errors and areas against the step, and of singular values against depth."""
    frame = collected.frame
    return {"grid": _grid(frame), "steps": _steps(frame), "volume": _volume(frame)}


def _grid(frame: pd.DataFrame) -> Figure:
    rows = frame[frame["model"] == "plane"]
    seeds = sorted(rows["seed"].unique())[:3]
    figure, axes = plt.subplots(1, len(seeds), figsize=(4.4 * len(seeds), 4.6), layout="constrained", squeeze=False)
    for ax, seed in zip(axes[0], seeds, strict=True):
        _draw_grid(ax, rows[rows["seed"] == seed])
        ax.set_title(f"initialization {seed}", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(
        "A grid of the plane, mapped by a tanh network and by its Jacobian at the center; each axis with its own scale",
        fontsize=11,
    )
    return figure


def _draw_grid(ax: Axes, rows: pd.DataFrame) -> None:
    image = numbers.rows_of(rows, "image").pivot_table(index=["u", "v"], columns="axis", values="value", observed=True)
    linear = numbers.rows_of(rows, "linear").pivot_table(index="axis", columns="index", values="value", observed=True)
    affine, points = linear.to_numpy(), np.array(image.index.to_list())
    flat = affine[:, :1].T + points @ affine[:, 1:].T
    num = round(math.sqrt(len(points)))
    blue, orange = COLORS[:2]
    styles = ((flat, orange, 0.8, "linearization f(x) + J dx"), (image.to_numpy(), blue, 1.1, "network"))
    for values, color, width, label in styles:
        table = values.reshape(num, num, 2)
        for line in (*table, *table.transpose(1, 0, 2)):
            ax.plot(line[:, 0], line[:, 1], color=color, linewidth=width, label=label)
            label = "_nolegend_"
    ax.plot(*affine[:, 0], "o", color="black", markersize=5, label="f(x)", zorder=5)
    ax.set(xlabel="first output", ylabel="second output")
    sns.despine(ax=ax)


def _steps(frame: pd.DataFrame) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    errors = numbers.rows_of(frame, "linearization_error")
    determinants = numbers.rows_of(frame, "determinant").set_index("seed")["value"]
    areas = numbers.rows_of(frame, "area")
    color = COLORS[0]
    difference = areas.assign(value=(areas["value"] / areas["seed"].map(determinants) - 1).abs())
    for ax, rows, power, to, label in (
        (left, errors, 1, "h", "relative error of the linearization"),
        (right, difference, 2, "$h^2$", r"relative difference of area and $|\det J|$"),
    ):
        for _, part in rows.groupby("seed", observed=True):
            ax.plot(part["step"], part["value"], "o-", color=color, alpha=0.5, markersize=3, linewidth=1)
        ax.plot(STEPS, STEPS**power, color="0.4", linestyle="--", linewidth=1, label=f"proportional to {to}")
        ax.set(xscale="log", yscale="log", xlabel="step h", ylabel=label)
        ax.legend(frameon=False, fontsize=9)
        sns.despine(ax=ax)
    about = f"{errors['seed'].nunique()} initializations, a line each"
    figure.suptitle(f"Linearization of a map of the plane; {about}", fontsize=10)
    return figure


def _volume(frame: pd.DataFrame) -> Figure:
    size = (2.9 * len(DEEP), 6.0)
    figure, axes = plt.subplots(
        2, len(DEEP), figsize=size, layout="constrained", sharex=True, sharey="row", height_ratios=(3, 2)
    )
    colors, lines = COLORS, ("-", "--", ":")
    width = numbers.width(frame)
    for column, model in zip(axes.T, DEEP, strict=True):
        for color, line, (quantity, label) in zip(colors, lines, WORDS.items(), strict=False):
            _band(column[0], numbers.by_depth(frame, model, quantity) / math.log(10), color, line, label)
        column[0].axhline(0, color="0.6", linewidth=0.8, zorder=0)
        column[0].set_title(model, fontsize=10)
        _band(column[1], numbers.by_depth(frame, model, "effective_rank"), colors[3], "-", None)
        column[1].set(yscale="log", ylim=(1, 1.3 * width), xlabel="layer, from the input")
    axes[0, 0].set_ylabel(r"$\log_{10}$ of a mean of the singular values")
    axes[1, 0].set_ylabel("effective rank")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    about = f"width {width}; mean over {frame['seed'].nunique()} seeds, band: 95 % interval"
    figure.suptitle(f"Jacobian from the input to each layer, {about}", fontsize=10)
    return figure


def _band(ax: Axes, table: pd.DataFrame, color: object, line: str, label: str | None) -> None:
    found = [means.mean(values) for _, values in table.items()]
    ax.plot(table.columns, [one.value for one in found], line, color=color, linewidth=1.6, label=label)
    low, high = np.transpose([(one.low, one.high) for one in found])
    ax.fill_between(table.columns, low, high, color=color, alpha=0.25, linewidth=0)
    sns.despine(ax=ax)
