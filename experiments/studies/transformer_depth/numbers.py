"""Totals, growth per block and lengths, read from the frame of the study transformer_depth."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandas as pd

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
    """log10 GSC from the embedding to the last block, with one row per seed and one column per depth."""
    rows = _rows(frame, norm, scale, "gsc")
    rows = rows[rows["layer"] == "embedding"]
    return rows.pivot_table(index="seed", columns="depth", values="log10_value", observed=True)


def lengths(frame: pd.DataFrame, norm: str, scale: str = UNIT) -> pd.DataFrame:
    """log10 growth of the squared length of the stream, with one row per seed and one column per depth."""
    rows = _rows(frame, norm, scale, "log10_square_growth")
    return rows.pivot_table(index="seed", columns="depth", values="value", observed=True)


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
