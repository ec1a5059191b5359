"""Where two tables of the same run differ: column by column, and by more than is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from gradscope import frames

# Of a record of training: how long it took is no part of what came out.
TIMES = ("images_per_second", "seconds")
# Rows of a frame are those of the same layer and quantity, and of whatever else stands in its own columns.
KEYS = ("step", "seed", "layer", "target", "quantity")
# Columns that are logarithms, or errors of one.
LOGARITHMS = ("log10_value", "log10_stderr_probe", "log10_stderr_sample", *frames.OPTIONAL)

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """A column that differs: in how many rows, by how much at most on the scale of a log10, and where that is."""

    column: str
    num_rows: int
    largest: float
    where: str

    def __str__(self) -> str:
        rows = f"{self.num_rows} row{'s' * (self.num_rows > 1)}"
        return f"{self.column} differs in {rows}, by up to {self.largest:.3g} ({self.where})"


def recorded_in_both(before: pd.DataFrame, after: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of two frames of a monitor, where ``before`` lacks records that its budget of time left out, what to compare.

    Those records of ``after`` are left out; and so are the changes of weights since the record before, where that was
    another one.
    """
    steps = [np.unique(frame["step"]) for frame in (before, after)]
    previous = [dict(zip(own, [None, *own], strict=False)) for own in steps]
    same = [step for step in steps[0] if previous[0][step] == previous[1].get(step)]
    kept = [
        frame[frame["step"].isin(steps[0]) & (frame["step"].isin(same) | (frame["quantity"] != "update_to_weight"))]
        for frame in (before, after)
    ]
    return kept[0].reset_index(drop=True), kept[1].reset_index(drop=True)


def differences(before: pd.DataFrame, after: pd.DataFrame) -> list[Difference]:
    """Every column that is not the same in both, bit for bit; nulls are equal to nulls, times are left out.

    Columns that both have are compared.  A difference is measured on the scale of a log10: of logarithms and their
    errors it is the difference; of other numbers ``-log10(1 - |a - b| / m)``, which for positive ones is
    ``|log10 a - log10 b|``, where ``m`` is the larger of the two, or of their standard errors where those are larger.
    It is infinite where one of the two is null or infinite and the other is not the same, where ``|a - b|`` reaches
    ``m``, and for whatever is no floating-point number: names, counts, places.

    Raises:
        ValueError: Their rows are not those of the same layers, quantities and steps.
    """
    names = [name for name in KEYS if name in before and name in after]
    rows = [frame[names].astype("string").fillna("").reset_index(drop=True) for frame in (before, after)]
    if len(before) != len(after) or not rows[0].equals(rows[1]):
        raise ValueError(f"The repeated run has other rows: {len(after)} instead of {len(before)}, or other layers.")
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
    """How far apart a column is, row by row; 0 where it is the same bit for bit."""
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
        if name == "value":  # where there is a logarithm it counts, beyond the range of float64 too
            logarithms = np.abs(np.subtract(*_numbers("log10_value", before, after)))
            distance = np.where(np.isfinite(logarithms), logarithms, distance)
    # One that differs in its last bit may have no distance that float64 can hold.
    distance = np.where(np.isnan(distance), np.inf, np.maximum(distance, np.finfo(np.float64).tiny))
    return np.where(same, 0.0, distance)


def _scale(name: str, before: pd.DataFrame, after: pd.DataFrame) -> Numbers:
    """What a difference is relative to; values and their standard errors are on one scale."""
    names = ("value", "stderr_sample") if name in ("value", "stderr_sample") else (name,)
    sizes = [np.abs(np.nan_to_num(column)) for key in names for column in _numbers(key, before, after)]
    return np.max(sizes, axis=0)


def _numbers(name: str, *tables: pd.DataFrame) -> list[Numbers]:
    return [table[name].to_numpy(dtype=np.float64, na_value=np.nan) for table in tables]


def largest(found: Sequence[Difference]) -> float:
    """The largest of all; 0 is bit for bit."""
    return max((difference.largest for difference in found), default=0.0)


def worst(found: Sequence[Difference]) -> Difference:
    """The one that differs most; of equals the logarithm, then the first of the schema."""
    order = list(dict.fromkeys(("log10_value", *frames.SCHEMA)))
    return max(found, key=lambda one: (one.largest, -order.index(one.column) if one.column in order else -len(order)))
