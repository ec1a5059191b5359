"""Differences between two tables of the same run, column by column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradscope import frames

# Columns of training records that depend on the speed of the machine.  They are not compared.
TIMES = ("images_per_second", "seconds")
UPDATES = ("update_to_weight", "update_max")  # since the previous record
# Two rows belong together if they agree in these columns.
KEYS = ("step", "seed", "layer", "target", "quantity")
# Columns that are logarithms or errors of a logarithm.
LOGARITHMS = ("log10_value", "log10_stderr_probe", "log10_stderr_sample", *frames.OPTIONAL)

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A column that differs: the number of rows that differ, the largest difference, and its place in the table."""

    column: str
    num_rows: int
    largest: float
    where: str

    def __str__(self) -> str:
        rows = f"{self.num_rows} row{'s' * (self.num_rows > 1)}"
        return f"{self.column} differs in {rows}, by up to {self.largest:.3g} ({self.where})"


def recorded_in_both(before: pd.DataFrame, after: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of two monitor frames that can be compared.  ``before`` may lack records that were skipped to save time.

    Updates are changes since the previous record; a row of them is kept only if both frames have that record.
    """
    steps = [np.unique(frame["step"]) for frame in (before, after)]
    previous = [dict(zip(own, [None, *own], strict=False)) for own in steps]
    same = [step for step in steps[0] if previous[0][step] == previous[1].get(step)]
    kept = [
        frame[frame["step"].isin(steps[0]) & (frame["step"].isin(same) | ~frame["quantity"].isin(UPDATES))]
        for frame in (before, after)
    ]
    return kept[0].reset_index(drop=True), kept[1].reset_index(drop=True)


def differences(before: pd.DataFrame, after: pd.DataFrame) -> list[Difference]:
    """All common columns that are not equal bit for bit.  Nulls equal nulls, and times are not compared.

    A difference has the scale of a log10.  It is ``|a - b|`` for logarithms and their errors.  For other numbers it is
    ``-log10(1 - |a - b| / m)``, where ``m`` is the largest of the two numbers and their standard errors.  A difference
    is infinite if ``|a - b|`` reaches ``m``, if only one value is null or infinite, or if two names or counts differ.
    """
    names = [name for name in KEYS if name in before and name in after]
    rows = [frame[names].astype("string").fillna("").reset_index(drop=True) for frame in (before, after)]
    if len(before) != len(after) or not rows[0].equals(rows[1]):
        raise ValueError(f"The repeated run has other rows ({len(before)} then, {len(after)} now) or other layers.")
    found = []
    for name in before.columns:
        if name in TIMES or name not in after:
            continue
        distance = _distances(name, before, after)
        if (differs := distance > 0).any():
            worst = int(distance.argmax())
            place = ", ".join(f"{key} {before[key].iloc[worst]}" for key in names if pd.notna(before[key].iloc[worst]))
            values = f"{before[name].iloc[worst]!s} then, {after[name].iloc[worst]!s} now"
            found.append(Difference(str(name), int(differs.sum()), float(distance.max()), f"{place}: {values}"))
    return found


def _distances(name: str, before: pd.DataFrame, after: pd.DataFrame) -> Numbers:
    """The difference of a column in each row; 0 where the two values are equal bit for bit."""
    if not all(pd.api.types.is_float_dtype(frame[name]) for frame in (before, after)):
        words = [frame[name].astype("string").fillna("").to_numpy() for frame in (before, after)]
        return np.where(words[0] == words[1], 0.0, np.inf)
    a, b = _numbers(name, before, after)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(all="ignore"):
        if name in LOGARITHMS:
            distance = np.abs(a - b)
        else:
            distance = -np.log10(np.maximum(0.0, 1.0 - np.abs(a - b) / _scale(name, before, after)))
        if name == "value":  # use logarithms where they exist: they are finite even if values overflow
            logarithms = np.abs(np.subtract(*_numbers("log10_value", before, after)))
            distance = np.where(np.isfinite(logarithms), logarithms, distance)
    # If two values differ in the last bit, the computed distance may be 0, but it must be positive.
    distance = np.where(np.isnan(distance), np.inf, np.maximum(distance, np.finfo(np.float64).tiny))
    return np.where(same, 0.0, distance)


def _scale(name: str, before: pd.DataFrame, after: pd.DataFrame) -> Numbers:
    """The number ``m`` of each row (see `differences`).  A value and its standard error have the same ``m``."""
    names = ("value", "stderr_sample") if name in ("value", "stderr_sample") else (name,)
    sizes = [np.abs(np.nan_to_num(column)) for key in names for column in _numbers(key, before, after)]
    return np.max(sizes, axis=0)


def _numbers(name: str, *tables: pd.DataFrame) -> list[Numbers]:
    return [table[name].to_numpy(dtype=np.float64, na_value=np.nan) for table in tables]


def worst(found: Sequence[Difference]) -> Difference:
    """The largest difference.  Of equally large ones: ``log10_value`` first, then in the order of the schema."""
    order = list(dict.fromkeys(("log10_value", *frames.SCHEMA)))
    return max(found, key=lambda one: (one.largest, -order.index(one.column) if one.column in order else -len(order)))
