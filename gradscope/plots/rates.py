"""Growth rates of many networks, one per row."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from gradscope.plots.rows import axes

# Color and shape of each verdict; shapes distinguish them without color.
VERDICTS = {
    "exploding": (3, "^"), "vanishing": (0, "v"), "stable": (2, "o"), "irregular": (7, "s"),
}  # fmt: skip
OTHER = (7, "D")


def rates(growth: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Axes with the growth rate of each network, its 95 % interval and its verdict.

    Crosses are theory.  The vertical line is rate 1, where coefficients neither grow nor shrink.

    Arguments:
        growth: One row per network, from top to bottom, with columns ``network``, ``theory`` (may be null), and
            ``rate``, ``rate_low``, ``rate_high`` and ``verdict`` of `gradscope.Growth`.
        ax: Where to draw; a new figure by default.

    >>> growth = {"rate": [1.2], "rate_low": [1.1], "rate_high": [1.3], "verdict": ["exploding"], "theory": [1.25]}
    >>> ax = rates(pd.DataFrame({"network": ["tanh"], **growth}))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['theory', 'exploding']
    """
    ax = axes(ax, (7.0, 1.2 + 0.22 * len(growth)))
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
