"""Growth of the networks of a study: measured over seeds, and predicted by mean-field theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache

import numpy as np
import pandas as pd

import gradscope as gs
from gradscope import frames
from gradscope import meanfield as mf

NEEDED = ("activation", "norm", "depth", "residual", "data", "init", "batch_size")


def predictable(row: pd.Series) -> bool:
    """Whether the theory covers a network: a plain or residual MLP with standard weights on Gaussian noise."""
    return (
        all(name in row and not pd.isna(row[name]) for name in NEEDED)
        and row["data"] == "noise"
        and row["init"] == "auto"
        and row["activation"] in mf.NAMED
        and pd.isna(row.get("out_features"))
    )


def profile(row: pd.Series) -> mf.Prediction:
    """The mean-field prediction for the network of one row."""
    phi = mf.as_activation(str(row["activation"]))
    variance = row.get("weight_variance")
    variance = mf.standard_variance(phi) if pd.isna(variance) else float(variance)
    block = (1.0, row["skip_weight"]) if row["residual"] == "identity" else ()
    layer = mf.LayerSpec.of(phi, variance, row.get("bias_variance") or 0.0, str(row["norm"]), *block)
    return _predicted(layer, int(row["depth"]), int(row["batch_size"]))


@cache
def _predicted(layer: mf.LayerSpec, depth: int, batch_size: int) -> mf.Prediction:
    """Cached, because several tables and figures need it.  Batch normalization makes it slow: half a second."""
    return mf.predict([layer] * depth, batch_size=batch_size)


def profiles(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Predicted log10 GSC from each layer to the output, one row per layer, for networks that the theory covers."""
    parts = []
    for _, group in frame.groupby(list(keys), sort=False, observed=True, dropna=False):
        row = group.iloc[0]
        if predictable(row):
            log10_gsc = profile(row).log10_gsc
            values = {"depth_from_output": np.arange(len(log10_gsc))[::-1], "log10_value": log10_gsc}
            parts.append(pd.DataFrame({**row[list(keys)], **values}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def rate(row: pd.Series) -> float:
    """Predicted growth rate per layer, over the half of the layers nearer the output; NaN if there is none."""
    if not predictable(row):
        return math.nan
    log10_gsc = profile(row).log10_gsc
    first, last = (len(log10_gsc) - 1) // 2, len(log10_gsc) - 2
    if last <= first:
        return math.nan
    return float(10 ** ((log10_gsc[first] - log10_gsc[last]) / (last - first)))


def growth_table(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Growth of each network over its seeds, by `gradscope.growth`.

    One row per combination of ``keys``: the fields of `gradscope.Growth`, num_seeds, log10 GSC of the farthest layer
    with its standard error over seeds, and the predicted rate.  If a network has too few layers for a rate, the rate is
    NaN, and the verdict states the reason.

    Raises:
        ValueError: The frame has no rows of quantity "gsc".
    """
    rows = frames.to_last_target(frame[frame["quantity"] == "gsc"])
    if rows.empty:
        found = ", ".join(dict.fromkeys(frame["quantity"]))
        raise ValueError(f"Growth rates need GSC, but these runs measured only {found}: choose what to draw with y=.")
    result = []
    for key, group in rows.groupby(keys, sort=False, observed=True, dropna=False):
        total = group.loc[group["depth_from_output"] == group["depth_from_output"].max()]
        total = total.groupby("seed", observed=True)["log10_value"].mean()
        entry = dict(zip(keys, key, strict=True)) | {"num_seeds": len(total), "log10_gsc": float(total.mean())}
        entry["log10_gsc_stderr"] = float(total.std() / math.sqrt(len(total))) if len(total) > 1 else math.nan
        try:
            entry |= asdict(gs.growth(group))
        except ValueError as reason:
            entry |= dict.fromkeys(("rate", "intercept", "rate_low", "rate_high"), math.nan) | {"verdict": str(reason)}
        result.append(entry | {"theory": rate(group.iloc[0])})
    return pd.DataFrame(result)
