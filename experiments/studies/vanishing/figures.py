"""Figures of the study vanishing."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from experiments.archive.tables import Collected
from experiments.evidence import means
from experiments.evidence.colors import COLORS
from experiments.studies.vanishing import chains, numbers
from experiments.studies.vanishing.numbers import ACTIVATIONS, NORMS, SCALES, SIGMOID, SLOPE

TITLES = {"none": "no normalization", "batch": "batch normalization", "layer": "layer normalization"}


def draw(collected: Collected) -> dict[str, Figure]:
    """Figures of the gradients of every layer, of chains and their bounds, and of larger weights."""
    frame = collected.frame
    return {"gradients": _gradients(frame), "chains": _long_chains(frame), "weights": _larger_weights(frame)}


def _gradients(frame: pd.DataFrame) -> Figure:
    figure, axes = plt.subplots(1, len(NORMS), figsize=(12.0, 4.2), layout="constrained", sharey=True)
    rows = numbers.chosen(frame[frame["weight_scale"] == 1], "gradient_norm")
    rows = rows[rows["layer"].str.startswith("layers.")]
    for ax, norm in zip(axes, NORMS, strict=True):
        sns.lineplot(
            rows[rows["norm"] == norm], x="index", y="log10_value", hue="activation", hue_order=ACTIVATIONS,
            style="activation", style_order=ACTIVATIONS, errorbar="sd", palette=COLORS[: len(ACTIVATIONS)], ax=ax,
            legend=norm == "none",
        )  # fmt: skip
        label = r"$\log_{10}$ length of the gradient of its weights"
        ax.set(title=TITLES[norm], xlabel="layer, from the input", ylabel=label)
        sns.despine(ax=ax)
    axes[0].legend(frameon=False, fontsize=9, loc="lower right")
    about = f"{numbers.layers(frame)} layers; mean over {frame['seed'].nunique()} seeds, band: one standard deviation"
    figure.suptitle(f"Gradients at initialization, {about}", fontsize=10)
    return figure


def _long_chains(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for color, chain in zip(COLORS, chains.LONG, strict=False):
        for quantity, style, words in (("log10_chain", "-", "measured"), ("log10_chain_bound", ":", "bound")):
            values = chains.rows(frame, quantity, chain)
            width = 2.4 if style == ":" else 1.4
            ax.plot(values.index, values, style, color=color, label=f"{chain}: {words}", linewidth=width)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="units L in a row", ylabel=r"$\log_{10} |dh_L / dh_0|$", title="Chains of sigmoid units, exact")
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure


def _larger_weights(frame: pd.DataFrame) -> Figure:
    figure, ax = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    scales = np.array([1, *SCALES])
    found = [numbers.rate(frame, *SIGMOID, scale) for scale in scales]
    color, other = COLORS[:2]
    means.errorbars(ax, scales**2, found, fmt="o", color=color, capsize=3, label="measured")
    fine = np.geomspace(1, scales[-1], 33)
    ax.plot(fine**2, [numbers.in_theory(scale) for scale in fine], "--", color=color, label="mean field")
    ax.plot(scales**2, SLOPE * scales, ":", color=other, linewidth=2.4, label="bound by the slope")
    ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(scales**2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.set(xlabel="variance of the weights, times n", ylabel="factor per layer, toward the input")
    about = f"mean over {frame['seed'].nunique()} seeds, bars: 95 % interval"
    ax.set_title(f"Gradients of a sigmoid network without normalization; below 1 they vanish\n{about}", fontsize=10)
    ax.legend(frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return figure
