"""Rows of benchmark results, and their tidy frame."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from benchmarks.tables.timing import Times


@dataclass(frozen=True)
class Row:
    """One measured number, and its ratio to the reference of the same group and case.

    Arguments:
        quantity: "seconds", "bytes", "relative_rms" (error over probe seeds), "times" (a ratio), or "count".
        value, low, high: Median and quartiles of ``num`` repetitions; quartiles are NaN if ``num`` is 1.
        ratio, ratio_low, ratio_high: ``value``, ``low`` and ``high`` divided by the median of the reference.
    """

    group: str
    case: str
    what: str
    quantity: str
    value: float
    low: float = math.nan
    high: float = math.nan
    num: int = 1
    reference: str = ""
    ratio: float = math.nan
    ratio_low: float = math.nan
    ratio_high: float = math.nan


def timed(group: str, case: str, times: dict[str, Times], reference: str) -> list[Row]:
    """Rows of one race; their ratios are to the contestant named ``reference``."""
    unit = times[reference].median
    rows = []
    for what, measured in times.items():
        low, high = measured.quartiles if len(measured.seconds) > 1 else (math.nan, math.nan)
        value, num = measured.median, len(measured.seconds)
        ratios = value / unit, low / unit, high / unit
        rows.append(Row(group, case, what, "seconds", value, low, high, num, reference, *ratios))
    return rows


def find(rows: Sequence[Row], group: str, what: str, quantity: str = "seconds") -> Row | None:
    """The row of that name, or None if it was not measured."""
    found = (row for row in rows if (row.group, row.what, row.quantity) == (group, what, quantity))
    return next(found, None)


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """A tidy frame with one row per number; columns are the fields of `Row`."""
    return pd.DataFrame([asdict(row) for row in rows])
