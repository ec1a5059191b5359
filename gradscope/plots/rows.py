"""What all figures share: axes, labels, colors, and the selection of rows."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes

LABELS = {
    "gsc": r"$\log_{10}$ GSC (squared convention)",
    "preactivation_std": "pre-activation standard deviation",
    "sign_diversity": "sign diversity",
    "linear_fit_error": "linear fit error",
    "depth_from_output": "layers between $f_k$ and the target",
    "index": "layer, from the input",
}
DIVERGING = "vlag"  # red and blue around white; readable with common kinds of color blindness, and in gray
MAX_NAMED_LAYERS = 24


def axes(ax: Axes | None, size: tuple[float, float] = (6.4, 4.2)) -> Axes:
    """The Axes ``ax``, or those of a new figure of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=size, layout="constrained")[1]


def name_layers(ax: Axes, rows: pd.DataFrame, **text: Any) -> None:
    """Write the name of each layer at its index on the x axis, and draw the line GSC = 1, where log10 GSC is 0."""
    names = rows.drop_duplicates("index").sort_values("index")
    ax.set_xticks(names["index"], names["layer"], rotation=60, ha="right", rotation_mode="anchor", **text)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="", ylabel=LABELS["gsc"])


def rows_of(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of one quantity.  If there are none, a ValueError lists the quantities of the frame."""
    rows = frame[frame["quantity"] == quantity]
    if rows.empty:
        known = ", ".join(map(repr, frame["quantity"].unique()))
        raise ValueError(f"The frame has no rows of quantity {quantity!r}; it has {known}.")
    return rows


def num_runs(rows: pd.DataFrame) -> int:
    """The number of seeds; 1 if the rows have no column ``seed``."""
    return int(rows["seed"].nunique()) if "seed" in rows else 1


def finite_limits(values: npt.ArrayLike, *, symmetric: bool) -> tuple[float, float]:
    """The ends of a scale for all finite logarithms, optionally symmetric about 0; ValueError if none is finite."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise ValueError("Every number is zero or not finite, so there is nothing to draw on a logarithmic scale.")
    largest = float(np.abs(finite).max())
    low, high = (-largest, largest) if symmetric else (float(finite.min()), float(finite.max()))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def thinned(names: pd.Series) -> list[str]:
    """The names, with all but every n-th replaced by "", so that at most `MAX_NAMED_LAYERS` remain."""
    step = int(np.ceil(len(names) / MAX_NAMED_LAYERS))
    return [name if number % step == 0 else "" for number, name in enumerate(names)]


def spread_apart(heights: npt.ArrayLike, gap: float) -> list[float]:
    """The heights of labels in the given order, moved apart until neighbors differ by at least ``gap``."""
    values = np.asarray(heights, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    moved = values[order]
    for _ in range(100):
        for a in range(len(moved) - 1):
            if (overlap := gap - (moved[a + 1] - moved[a])) > 1e-9 * gap:
                moved[a] -= overlap / 2
                moved[a + 1] += overlap / 2
    result = np.empty_like(moved)
    result[order] = moved
    return result.tolist()
