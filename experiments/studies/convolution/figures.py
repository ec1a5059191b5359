"""Figures of the study of convolution."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence.means import errorbars, mean
from experiments.studies.convolution.measurement import BEFORE, CONNECTED, CONVOLUTIONAL, RECTIFIED, SHIFTS, STAGES
from experiments.studies.convolution.numbers import POOLED, WHEN, FloatArray, by_seed, change

NAMES = {CONVOLUTIONAL: "AlexNet B", CONNECTED: "fully connected"}
AXES = {"row": "down", "column": "across"}
COLORS = sns.color_palette("colorblind")


def draw(collected: Collected) -> dict[str, Figure]:
    """Errors of maps and outputs against the shift, pooled maps, and pixels by position."""
    frame, note = collected.frame, collected.manifest.get("note")
    data = f"CIFAR-10 ({note})" if note else "CIFAR-10"
    bars = f"{data}; mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
    return {
        "equivariance": _equivariance(frame, f"Do the maps of AlexNet B move with the image?\n{bars}"),
        "invariance": _invariance(frame, f"Does the output stay as it is?\n{bars}"),
        "pooling": _pooling(frame, f"Maps of AlexNet B under a shift by one pixel, pooled\n{bars}"),
        "stationarity": _stationarity(
            frame, f"Gray values by position; {bars}; band: standard deviation over positions"
        ),
    }


def _equivariance(frame: pd.DataFrame, title: str) -> Figure:
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True)
    for ax, (training, words) in zip(axes, WHEN.items(), strict=True):
        for number, stage in enumerate(STAGES):
            values = [
                by_seed(frame, "equivariance_error", layer=stage, training=training, shift=shift) for shift in SHIFTS
            ]
            _bars(ax, np.array(SHIFTS) + 0.06 * (number - 2.5), values, stage, "os^DvP"[number], COLORS[number], ":")
        ax.set_title(words, fontsize=10)
        ax.set(xlabel="shift of the image [pixels]", xticks=SHIFTS)
    axes[0].set_ylabel("relative error of the map, away from the border")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _invariance(frame: pd.DataFrame, title: str) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    series = [(number, network, training) for number, network in enumerate(NAMES) for training in WHEN]
    for place, (number, network, training) in enumerate(series):
        of = {"network": network, "training": training}
        label, (marker, line) = f"{NAMES[network]}, {WHEN[training]}", ("o", "--") if training == BEFORE else ("s", "-")
        changes = [change(frame, network, training, shift) for shift in SHIFTS]
        classes = [by_seed(frame, "class_agreement", shift=shift, **of) for shift in SHIFTS]
        beside = np.array(SHIFTS) + 0.08 * (place - 1.5)
        for ax, values in ((left, changes), (right, classes)):
            _bars(ax, beside, values, label, marker, COLORS[number], line)
    left.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    left.set_ylabel("change / distance of two images")
    right.set_ylabel("part of the images whose class stays")
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1.05)
    for ax in (left, right):
        ax.set(xlabel="shift of the image [pixels]", xticks=SHIFTS)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _pooling(frame: pd.DataFrame, title: str) -> Figure:
    figure, axes = plt.subplots(1, len(RECTIFIED), figsize=(9.0, 3.8), layout="constrained", sharey=True)
    for ax, layer in zip(axes, RECTIFIED, strict=True):
        for number, (training, words) in enumerate(WHEN.items()):
            of = {"layer": layer, "training": training}
            values = [by_seed(frame, "pooled_change", pooling=pooling, **of) for pooling in POOLED]
            _bars(ax, np.arange(len(POOLED)) + 0.1 * (number - 0.5), values, words, "os"[number], COLORS[number], "")
        ax.set_xticks(range(len(POOLED)), [words.replace(" ", "\n", 1) for words in POOLED.values()], fontsize=9)
        ax.set_title(layer, fontsize=10)
        ax.set_ylim(bottom=0)
    axes[0].set_ylabel("change / distance of two images")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.suptitle(title, fontsize=10)
    return figure


def _stationarity(frame: pd.DataFrame, title: str) -> Figure:
    """Mean and standard deviation along each axis, and correlations with their spread over positions."""
    figure, axes = plt.subplots(1, 3, figsize=(13.0, 4.0), layout="constrained")
    for number, (axis, words) in enumerate(AXES.items()):
        color, line = COLORS[number], ("-", "--")[number]
        for ax, name, shown in ((axes[0], "pixel_mean", np.asarray), (axes[1], "pixel_variance", np.sqrt)):
            profile = shown(_profile(frame, name, axis))
            _bars(ax, np.arange(len(profile)), list(profile), f"by {axis}", "", color, line)
        middle, spread = (_profile(frame, name, axis) for name in ("correlation", "correlation_spread"))
        places, center, width = np.arange(len(middle)), middle.mean(axis=1), spread.mean(axis=1)
        _bars(axes[2], places, list(middle), words, "", color, line)
        axes[2].fill_between(places, center - width, center + width, color=color, alpha=0.2)
    axes[0].set(xlabel="position [pixels]", ylabel="mean gray value, 0 to 1")
    axes[1].set(xlabel="position [pixels]", ylabel="standard deviation of gray values", ylim=(0, None))
    axes[2].set(xlabel="distance [pixels]", ylabel="correlation of two pixels")
    axes[2].set(ylim=(0, 1.02), xticks=range(0, 17, 4))
    for ax in axes:
        ax.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure


def _profile(frame: pd.DataFrame, quantity: str, axis: str) -> FloatArray:
    """(positions, seeds)."""
    rows = frame[(frame["quantity"] == quantity) & (frame["axis"] == axis)]
    return rows.pivot_table(index="place", columns="seed", values="value", observed=True).to_numpy(dtype=np.float64)


def _bars(
    ax: Axes, x: npt.ArrayLike, values: list[FloatArray], label: str, marker: str, color: object, line: str = "-"
) -> None:
    """Means over seeds with their intervals."""
    errorbars(
        ax, x, [mean(of_seeds) for of_seeds in values], marker=marker, linestyle=line or "none", color=color,
        label=label, markersize=4, linewidth=1.2, elinewidth=0.9, capsize=2,
    )  # fmt: skip
    sns.despine(ax=ax)
