"""The difference of two saved results: profiles, matrices or measure frames of two models.

The probes of both are taken as independent, so the half-width of a change is hypot(h_a, h_b) for half-widths h of both
intervals, and Bonferroni's factor z(1 - 0.025 / K) / z(0.975) makes the intervals of K rows hold together.  If both
results have the same probes or samples, as by default, such intervals are too wide: `gradscope.diff` of the models
themselves pairs them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import special

from gradscope import frames
from gradscope.coefficients.profiles import Matrix
from gradscope.comparing.differences.difference import Difference
from gradscope.comparing.differences.matching import Structure, matched
from gradscope.estimates import UPPER

FloatArray = npt.NDArray[np.float64]
Saved = Matrix | pd.DataFrame | str | Path


def difference(a: Saved, b: Saved, level: float) -> Difference:
    """Compare two saved results, row by row.  ValueError if they share no row, or hold several rows of a layer."""
    first, second = (_frame(name, saved) for name, saved in (("a", a), ("b", b)))
    layers = [dict.fromkeys(one["layer"], Structure(())) for one in (first, second)]
    matching = matched(*layers)
    second = second.assign(other=second["layer"], layer=second["layer"].map(matching.partner))
    both = first.merge(second, on=["quantity", "layer", "target"], suffixes=("", "_b"), sort=False)
    if both.empty:
        raise ValueError("Both frames share no quantity of a layer, so there is nothing to compare.")
    rows = []
    for quantity, own in both.groupby("quantity", sort=False):
        logarithmic = bool(own[["log10_value", "log10_value_b"]].notna().all(axis=None))
        column = "log10_value" if logarithmic else "value"
        with np.errstate(invalid="ignore"):  # -inf - -inf: both are zero
            change = np.nan_to_num((own[f"{column}_b"] - own[column]).to_numpy(dtype=np.float64), nan=0.0)
        many = special.ndtri(1 - (1 - level) / 2 / len(own)) / special.ndtri(UPPER)
        half = many * np.hypot(_half(own, "", logarithmic), _half(own, "_b", logarithmic))
        least = frames.ROUNDING if logarithmic else frames.ROUNDING * own[["value", "value_b"]].abs().max(axis=1)
        found = frames.observed(
            f"{'log10_' * logarithmic}{quantity}_change", change, layer=own["layer"].tolist(),
            index=own["index"].to_numpy(), stderr=half / special.ndtri(1 - (1 - level) / 2 / len(own)),
            num_samples=int(own[["num_samples", "num_samples_b"]].to_numpy().min()), other=own["other"].tolist(),
            low=change - half, high=change + half, rounding=np.broadcast_to(least, change.shape),
        )  # fmt: skip
        certain = np.abs(change) > half  # an unknown interval supports no claim
        rows.append(found.assign(differs=(np.abs(change) > found["rounding"]) & certain))
    frame = pd.concat(rows, ignore_index=True)
    forward = frame[frame["differs"] & (frame["quantity"] != "log10_gsc_change")].sort_values("index", kind="stable")
    return Difference(
        first=forward["layer"].iloc[0] if len(forward) else None,
        frame=frame,
        matching=matching,
        subject=f"Two saved results, {len(frame)} rows in both:",
        population=(
            f"Intervals ({level:.0%}) hold for all layers of a quantity together, for what the intervals of both "
            "results are for. The errors of both are taken as independent."
        ),
        remarks=(),
        saved=True,
    )


def _frame(name: str, saved: Saved) -> pd.DataFrame:
    """The checked frame of a result, with one row per quantity, layer and target."""
    if isinstance(saved, Matrix):
        found = saved.to_frame()
    else:
        found = frames.check(saved) if isinstance(saved, pd.DataFrame) else frames.load(saved)
    several = found[found.duplicated(["quantity", "layer", "target"])]
    if len(several):
        row = several.iloc[0]
        raise ValueError(
            f"{name} holds several rows of {row['quantity']!r} for layer {row['layer']!r}: keep one network and one "
            "step."
        )
    return found


def _half(own: pd.DataFrame, suffix: str, logarithmic: bool) -> FloatArray:
    """Half-widths of the 95 % intervals of one result; NaN if unknown."""
    if logarithmic and f"log10_low{suffix}" in own and own[f"log10_low{suffix}"].notna().any():
        return ((own[f"log10_high{suffix}"] - own[f"log10_low{suffix}"]) / 2).to_numpy(dtype=np.float64)
    column = "log10_stderr_sample" if logarithmic else "stderr_sample"
    return special.ndtri(UPPER) * own[f"{column}{suffix}"].to_numpy(dtype=np.float64, na_value=np.nan)
