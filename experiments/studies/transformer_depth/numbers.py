"""Totals, growth per block, lengths and skip shares, read from the frame of the study transformer_depth."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments.archive.tables import Collected

FloatArray = npt.NDArray[np.float64]

NORMS = ("pre", "post")
DEPTHS = (6, 12, 24, 48, 96)
UNIT, SCALED = "1.0", "depth"
# Growth between the last two of these depths is compared with growth between the first two.
WINDOW = (6, 24, 96)
# Late growth per block divided by early growth, for a power of the depth.  For an exponential, the ratio is 1.
POWER = (
    math.log(WINDOW[2] / WINDOW[1])
    / (WINDOW[2] - WINDOW[1])
    / (math.log(WINDOW[1] / WINDOW[0]) / (WINDOW[1] - WINDOW[0]))
)


def name(norm: str) -> str:
    """``pre-norm`` or ``post-norm``."""
    return f"{norm}-norm"


def _rows(frame: pd.DataFrame, norm: str, scale: str, quantity: str) -> pd.DataFrame:
    factor = frame["residual_scale"].astype(str).replace("1", UNIT)
    return frame[(frame["norm"] == norm) & (factor == scale) & (frame["quantity"] == quantity)]


def totals(frame: pd.DataFrame, norm: str, scale: str = UNIT) -> pd.DataFrame:
    """log10 GSC from the embedding to the logits, with one row per seed and one column per depth."""
    rows = _rows(frame, norm, scale, "gsc")
    rows = rows[rows["layer"] == "embedding"]
    return rows.pivot_table(index="seed", columns="depth", values="log10_value", observed=True)


def by_depth(frame: pd.DataFrame, norm: str, quantity: str, scale: str = UNIT) -> pd.DataFrame:
    """A quantity of whole networks, with one row per seed and one column per depth."""
    rows = _rows(frame, norm, scale, quantity)
    return rows.pivot_table(index="seed", columns="depth", values="value", observed=True)


def lengths(frame: pd.DataFrame, norm: str, scale: str = UNIT) -> pd.DataFrame:
    """log10 growth of the squared length of the stream, with one row per seed and one column per depth."""
    return by_depth(frame, norm, "log10_square_growth", scale)


def shares(frame: pd.DataFrame, norm: str, branch: str, source: str = "") -> pd.DataFrame:
    """Skip shares at the branches "attention" or "mlp" of the deepest networks; a row per seed, a column per block.

    ``source``: "" for what was measured, "_theory" for what was predicted.
    """
    rows = _rows(frame, norm, UNIT, f"skip_share{source}")
    rows = rows[(rows["depth"] == DEPTHS[-1]) & rows["layer"].str.endswith(branch)]
    block = rows["layer"].str.split(".").str[1].astype(int)
    return rows.assign(block=block).pivot_table(index="seed", columns="block", values="value", observed=True)


def within_band(frame: pd.DataFrame, norm: str, scale: str = UNIT) -> pd.DataFrame:
    """Whether the GSC of each network lies in the band of theory, with one row per seed and one column per depth."""
    found, low, high = (
        totals(frame, norm, scale),
        *(by_depth(frame, norm, f"log10_gsc_{end}", scale) for end in ("low", "high")),
    )
    return (low <= found) & (found <= high)


def condensed(collected: Collected) -> Collected:
    """Without skip shares that no figure shows: those of shallower networks and of scaled weights."""
    frame = collected.frame
    shown = (frame["depth"] == DEPTHS[-1]) & (frame["residual_scale"].astype(str) != SCALED)
    kept = ~frame["quantity"].str.startswith("skip_share") | shown
    return replace(collected, frame=frame[kept & (frame["layer"] != "head")].reset_index(drop=True))


def early_and_late(frame: pd.DataFrame, norm: str, scale: str = UNIT) -> tuple[FloatArray, FloatArray]:
    """Growth of log10 GSC per block, in the earlier and in the later part of `WINDOW`, one per seed."""
    begin, middle, end = (totals(frame, norm, scale)[depth].to_numpy() for depth in WINDOW)
    return (middle - begin) / (WINDOW[1] - WINDOW[0]), (end - middle) / (WINDOW[2] - WINDOW[1])


def exponents(frame: pd.DataFrame, norm: str) -> FloatArray:
    """d log GSC / d log depth, in the later part of `WINDOW`, one per seed."""
    _, late = early_and_late(frame, norm)
    return late * (WINDOW[2] - WINDOW[1]) / math.log10(WINDOW[2] / WINDOW[1])


def added(frame: pd.DataFrame, norm: str) -> FloatArray:
    """What blocks add to the squared length in the later part of `WINDOW`, divided by the earlier part, one per seed.

    Equal amounts per block give (96 - 24) / (24 - 6) = 4.
    """
    begin, middle, end = (10 ** lengths(frame, norm)[depth].to_numpy() for depth in WINDOW)
    return np.asarray((end - middle) / (middle - begin))
