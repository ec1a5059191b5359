"""What all figures share: labels, colors, and which rows of a frame they draw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

LABELS = {
    "gsc": r"$\log_{10}$ GSC (squared convention)",
    "preactivation_std": "pre-activation standard deviation",
    "sign_diversity": "sign diversity",
    "linear_fit_error": "linear fit error",
    "depth_from_output": "layers between $f_k$ and the target",
    "index": "layer, from the input",
}
DIVERGING = "vlag"  # red and blue about white: told apart with every common color blindness, and in gray by lightness
MAX_NAMED_LAYERS = 24


def rows_of(frame: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """The rows of one quantity; ValueError with the known ones where there are none."""
    rows = frame[frame["quantity"] == quantity]
    if rows.empty:
        known = ", ".join(map(repr, frame["quantity"].unique()))
        raise ValueError(f"The frame has no rows of quantity {quantity!r}; it has {known}.")
    return rows


def num_runs(rows: pd.DataFrame) -> int:
    """How many seeds there are."""
    return int(rows["seed"].nunique()) if "seed" in rows else 1


def finite_limits(values: npt.ArrayLike, *, symmetric: bool) -> tuple[float, float]:
    """Ends of a scale that holds every finite logarithm, ``symmetric`` about 0 or not; ValueError if there is none."""
    finite = np.asarray(values, dtype=np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        raise ValueError("Every number is zero or not finite, so there is nothing to draw on a logarithmic scale.")
    largest = float(np.abs(finite).max())
    low, high = (-largest, largest) if symmetric else (float(finite.min()), float(finite.max()))
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def thinned(names: pd.Series) -> list[str]:
    """So many of the names as fit on an axis, the others empty."""
    step = int(np.ceil(len(names) / MAX_NAMED_LAYERS))
    return [name if number % step == 0 else "" for number, name in enumerate(names)]


def spread_apart(heights: npt.ArrayLike, gap: float) -> list[float]:
    """The heights of labels, pushed apart where two are nearer than ``gap``; their order stays."""
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
