"""Rates of growth of many networks, one below the other."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

# Verdicts by color and by shape, so that they can be told apart without color.
VERDICTS = {
    "exploding": (3, "^"), "vanishing": (0, "v"), "stable": (2, "o"), "irregular": (7, "s"),
}  # fmt: skip
OTHER = (7, "D")


def rates(growth: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Rate of growth of each network with its 95 % interval and verdict.

    Arguments:
        growth: One row a network, with columns ``network``, ``rate``, ``rate_low``, ``rate_high``, ``verdict``, and
            ``theory`` (nulls where there is none), as of `gradscope.Growth`; drawn from top to bottom.
        ax: Where to draw.  Default: a new figure.

    A cross is what ``theory`` predicts; the line is rate 1, at which coefficients neither grow nor shrink.
    """
    ax = ax if ax is not None else plt.subplots(figsize=(7.0, 1.2 + 0.22 * len(growth)), layout="constrained")[1]
    colors = sns.color_palette("colorblind")
    ax.axvline(1.0, color="0.6", linewidth=0.8, zorder=0)
    growth = growth.reset_index(drop=True)
    for verdict, rows in growth.groupby("verdict", sort=False, observed=True):
        color, marker = VERDICTS.get(str(verdict), OTHER)
        ends = [rows["rate"] - rows["rate_low"], rows["rate_high"] - rows["rate"]]
        ax.errorbar(
            rows["rate"], rows.index, xerr=[end.clip(lower=0) for end in ends], fmt=marker, color=colors[color],
            linewidth=1.2, markersize=5, capsize=2, label=str(verdict),
        )  # fmt: skip
    if growth["theory"].notna().any():
        ax.plot(growth["theory"], growth.index, "x", color="black", markersize=6, markeredgewidth=1.2, label="theory")
    ax.set_yticks(range(len(growth)), growth["network"], fontsize=8)
    ax.set(ylim=(len(growth) - 0.5, -0.5), xlabel="GSC rate a layer (squared convention)")
    ax.grid(axis="y", color="0.93", zorder=-1)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    sns.despine(ax=ax)
    return ax
