"""Figures of the study of convolution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.colors import COLORS
from experiments.evidence.means import errorbars, mean
from experiments.studies.convolution.measurement import BEFORE, RECTIFIED, SHIFTS, STAGES
from experiments.studies.convolution.numbers import NAMES, POOLED, WHEN, FloatArray, by_seed, change

AXES = {"row": "down", "column": "across"}
SHIFTED: dict[str, Any] = {"xlabel": "shift of the image [pixels]", "xticks": SHIFTS}
DISTANCE = "change / distance of two images"


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of errors of maps and outputs against the shift, of pooled maps, and of pixels by position."""
    frame, note = collected.frame, collected.manifest.get("note")
    data = f"CIFAR-10 ({note})" if note else "CIFAR-10"
    bars = f"{data}; mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
    titles = {
        _equivariance: f"Do the maps of AlexNet B move with the image?\n{bars}",
        _invariance: f"Does the output stay the same?\n{bars}",
        _pooling: f"Maps of AlexNet B under a shift by one pixel, pooled\n{bars}",
        _stationarity: f"Gray values by position; {bars}; band: standard deviation over positions",
    }
    return {figure.__name__.lstrip("_"): figure(frame, title) for figure, title in titles.items()}


def _panels(columns: int, width: float, height: float, title: str, **options: Any) -> tuple[Figure, Any]:
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", **options)
    figure.suptitle(title, fontsize=10)
    return figure, axes


def _equivariance(frame: pd.DataFrame, title: str) -> Figure:
    figure, axes = _panels(2, 9.6, 4.2, title, sharey=True)
    for ax, (training, words) in zip(axes, WHEN.items(), strict=True):
        for number, stage in enumerate(STAGES):
            of = {"layer": stage, "training": training}
            values = [by_seed(frame, "equivariance_error", shift=shift, **of) for shift in SHIFTS]
            _bars(ax, np.array(SHIFTS) + 0.06 * (number - 2.5), values, stage, "os^DvP"[number], COLORS[number], ":")
        ax.set_title(words, fontsize=10)
        ax.set(**SHIFTED)
    axes[0].set_ylabel("relative error of the map, away from the border")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    return figure


def _invariance(frame: pd.DataFrame, title: str) -> Figure:
    figure, (left, right) = _panels(2, 9.6, 4.2, title)
    series = [(number, network, training) for number, network in enumerate(NAMES) for training in WHEN]
    for place, (number, network, training) in enumerate(series):
        of = {"network": network, "training": training}
        label, (marker, line) = f"{NAMES[network]}, {WHEN[training]}", ("o", "--") if training == BEFORE else ("s", "-")
        changes = [change(frame, network, training, shift) for shift in SHIFTS]
        classes = [by_seed(frame, "class_agreement", shift=shift, **of) for shift in SHIFTS]
        beside = np.array(SHIFTS) + 0.08 * (place - 1.5)
        _bars(left, beside, changes, label, marker, COLORS[number], line)
        _bars(right, beside, classes, label, marker, COLORS[number], line, most=1.0)  # no fraction exceeds 1
    left.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    left.set(ylabel=DISTANCE, ylim=(0, None), **SHIFTED)
    right.set(ylabel="fraction of images whose class stays", ylim=(0, 1.04), **SHIFTED)
    handles_and_labels = left.get_legend_handles_labels()
    figure.legend(*handles_and_labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _pooling(frame: pd.DataFrame, title: str) -> Figure:
    figure, axes = _panels(len(RECTIFIED), 9.6, 3.8, title, sharey=True)
    for ax, layer in zip(axes, RECTIFIED, strict=True):
        for number, (training, words) in enumerate(WHEN.items()):
            of = {"layer": layer, "training": training}
            values = [by_seed(frame, "pooled_change", pooling=pooling, **of) for pooling in POOLED]
            _bars(ax, np.arange(len(POOLED)) + 0.1 * (number - 0.5), values, words, "os"[number], COLORS[number], "")
        ax.set_xticks(range(len(POOLED)), [words.replace(" ", "\n", 1) for words in POOLED.values()], fontsize=9)
        ax.set_title(RECTIFIED[layer], fontsize=10)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel(DISTANCE)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    return figure


def _stationarity(frame: pd.DataFrame, title: str) -> Figure:
    """Mean and standard deviation along each axis, and correlations with their standard deviation over positions."""
    figure, axes = _panels(3, 13.0, 4.0, title)
    for axis, color, line in zip(AXES, COLORS, ("-", "--"), strict=False):
        average, variance, middle, spread = (
            _profile(frame, name, axis)
            for name in ("pixel_mean", "pixel_variance", "correlation", "correlation_spread")
        )
        shown = ((average, f"by {axis}"), (np.sqrt(variance), f"by {axis}"), (middle, AXES[axis]))
        for ax, (profile, label) in zip(axes, shown, strict=True):
            _bars(ax, np.arange(len(profile)), profile, label, "", color, line)
        center, width = middle.mean(axis=1), spread.mean(axis=1)
        axes[2].fill_between(np.arange(len(middle)), center - width, center + width, color=color, alpha=0.2)
    axes[0].set(xlabel="position [pixels]", ylabel="mean gray value, 0 to 1")
    axes[1].set(xlabel="position [pixels]", ylabel="standard deviation of gray values")
    axes[2].set(xlabel="distance [pixels]", ylabel="correlation of two pixels", ylim=(0, 1.02), xticks=range(0, 17, 4))
    for ax in axes:
        ax.legend(frameon=False, fontsize=9)
    return figure


def _profile(frame: pd.DataFrame, quantity: str, axis: str) -> FloatArray:
    """Values of a quantity along an axis, as an array of shape (positions, seeds)."""
    rows = frame[(frame["quantity"] == quantity) & (frame["axis"] == axis)]
    return rows.pivot_table(index="place", columns="seed", values="value", observed=True).to_numpy(dtype=np.float64)


def _bars(
    ax: Axes, x: npt.ArrayLike, values: Iterable[FloatArray], label: str, marker: str, color: object, line: str,
    most: float = math.inf,
) -> None:  # fmt: skip
    """Draw means over seeds with their intervals, which end at ``most``."""
    shown = [replace(one, high=min(one.high, most)) for one in map(mean, values)]
    errorbars(
        ax, x, shown, marker=marker, linestyle=line or "none", color=color, label=label, markersize=4, linewidth=1.2,
        elinewidth=0.9, capsize=2,
    )  # fmt: skip
    sns.despine(ax=ax)
