"""Tables of the page: the numbers of a frame, for people, for screen readers, and for whoever reads the page back."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

LAYER = "layer"
INTERVAL = "log10 GSC", "95 % low", "95 % high"  # of every layer
MOST_CELLS = 7_000  # of one table with all digits, so that a page stays small enough for an email
MOST_NAMES = 301  # rows, and columns, of a table of all pairs


def thinned(frame: pd.DataFrame, most: int) -> tuple[pd.DataFrame, str]:
    """Return at most ``most`` rows, evenly spread with both ends, and a sentence about it ("" if all rows are kept)."""
    if len(frame) <= most:
        return frame, ""
    kept = np.unique(np.linspace(0, len(frame) - 1, most).round().astype(int))
    return frame.iloc[kept], f"{len(kept)} of {len(frame)} rows are shown, evenly spread, to keep the page small."


def html(
    frame: pd.DataFrame, caption: str, *, errors: pd.DataFrame | None = None, interval: Sequence[str] = (),
    scores: Collection[str] = (),
) -> str:  # fmt: skip
    """Return a frame as an HTML table whose first column names the rows; everything is escaped.

    Numbers are shown with the digits that their errors support, and hold all digits in the attribute ``data-value``.
    An exact number has four digits, and one whose error is unknown three.  An unknown number is shown as a dash.
    Columns that hold nothing are left out.

    Arguments:
        errors: Standard errors of some columns, under the same names; they are shown after ±.
        scores: Names of columns whose standard error is one.
        interval: Names of the columns of a value and of both ends of its interval.  The ends are left out if no row
            has an interval, because all values are exact or no error is known.
    """
    spread = {name: (own.tolist(), "±") for name, own in (() if errors is None else errors.items())}
    spread |= {name: ([1.0] * len(frame), "") for name in scores}
    if interval:
        half = (frame[interval[2]] - frame[interval[1]]) / 2
        spread |= dict.fromkeys(interval, (half.tolist(), ""))
        frame = frame if (half > 0).any() else frame.drop(columns=list(interval[1:]))
    first, *names = frame.columns
    names = [name for name in names if not frame[name].map(lambda value: missing(value) or value == "").all()]
    kinds = {name: ' class="number"' * _numeric(frame[name]) for name in names}
    head = "".join(f'<th scope="col"{kinds.get(name, "")}>{escape(str(name))}</th>' for name in (first, *names))
    columns = [_cells(frame[name], *spread.get(name, ([0.0] * len(frame), ""))) for name in names]
    rows = [f'<th scope="row">{escape(str(name))}</th>' for name in frame[first]]
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in zip(rows, *columns, strict=True))
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cells(values: pd.Series, errors: Sequence[Any], sign: str) -> list[str]:
    if not _numeric(values):
        return [f"<td>{'' if missing(value) else escape(str(value))}</td>" for value in values]
    return [_number_cell(value, error, sign) for value, error in zip(values.tolist(), errors, strict=True)]


def _numeric(values: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)


def _number_cell(value: Any, error: Any, sign: str) -> str:
    if missing(value):
        return '<td data-value="">–</td>'
    if missing(error) or not 1e-9 * abs(value) < error < math.inf:  # exact but for rounding, or unknown
        return f'<td data-value="{value!r}">{number(value, 3 if missing(error) else 4)}</td>'
    spread = f" <small>{sign} {supported(error, error)}</small>" if sign else ""
    return f'<td data-value="{value!r}">{supported(value, error)}{spread}</td>'


def supported(value: float, error: float) -> str:
    """Return a number for people, with as many digits as two digits of its error support.

    >>> supported(1.23456, 0.0321), supported(12345.6, 321.0), supported(1.2e-9, 3.4e-8)
    ('1.235', '12350', '1e−09')
    """
    place = math.floor(math.log10(error)) - 1  # of the last digit
    if 1e-4 <= max(abs(value), error) < 1e6 or not value:
        text = f"{round(value, -place):.{max(0, -place)}f}" if value else "0"
    else:
        text = f"{value:.{max(0, math.floor(math.log10(abs(value))) - place)}e}"
    return (text if float(text) else text.lstrip("-")).replace("-", "−")


def missing(value: Any) -> bool:
    """Return whether a cell holds nothing: None, NaN or pandas.NA."""
    return bool(value is None or pd.isna(value))


def number(value: float, digits: int = 4) -> str:
    """Return a number for people, such as ``−1.235``, ``∞`` or ``unknown``."""
    if missing(value):
        return "unknown"
    if isinstance(value, int):
        return str(value)
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "−") if value else "0"


def grid(table: pd.DataFrame, caption: str, row: str) -> str:
    """Return a table of numbers with three decimals and little markup, for many pairs; the page draws it as well.

    Null cells at the end of a row are left out, which saves a quarter of a triangular table.
    """
    head = "".join(f'<th scope="col">{escape(str(name))}' for name in table.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(str(name))}'
        + "".join(f"<td>{_short(value)}" for value in values[: (~np.isnan(values)).cumsum().argmax() + 1])
        + "\n"
        for name, values in zip(table.index, table.to_numpy(dtype=float), strict=True)
    )
    start = f'<thead><tr><th scope="col">{escape(row)}{head}</thead>'
    return f'<table class="grid"><caption>{escape(caption)}</caption>{start}<tbody>\n{body}</tbody></table>'


def _short(value: float) -> str:
    if np.isnan(value):
        return ""
    return ("inf" if value > 0 else "-inf") if np.isinf(value) else f"{value:.3f}".replace("-0.000", "0.000")


def of_layers(
    gsc: pd.DataFrame, statistics: pd.DataFrame | None, theory: pd.Series | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return one row per layer with GSC and all statistics, and the standard errors of the statistics.

    Statistics belong to the layer whose name begins theirs.  If a layer holds several modules with the same statistic,
    each module has its own row below the layer.

    Arguments:
        gsc: The rows of a tidy frame with quantity "gsc" and one target.
        statistics: A tidy frame as of `gradscope.measure`; may be empty.
        theory: Predicted log10 GSC by layer.
    """
    units = list(gsc["layer"])
    rows = pd.DataFrame(
        {
            LAYER: units, "layers to the target": gsc["depth_from_output"].to_numpy(),
            **dict(zip(INTERVAL, gsc[["log10_value", "log10_low", "log10_high"]].to_numpy().T, strict=True)),
        }
    )  # fmt: skip
    if theory is not None:
        rows["log10 GSC, theory"] = theory.reindex(units).to_numpy(dtype=float)
    if statistics is None or statistics.empty:
        return rows, pd.DataFrame(index=rows.index)
    owner = {name: _owner(name, units) for name in statistics["layer"].unique()}
    own = statistics.assign(unit=statistics["layer"].map(owner), quantity=statistics["quantity"].str.replace("_", " "))
    crowded = set(own.loc[own.duplicated(["unit", "quantity"], keep=False), "unit"])
    own["row"] = own["unit"].where(~own["unit"].isin(crowded), own["layer"])
    signed = own["log10_value"].isna()
    own["error"] = own["stderr_sample"].where(signed, own["value"] * own["log10_stderr_sample"] * math.log(10))
    order: dict[Hashable, None] = {}
    for unit in [*units, *(u for u in own["unit"].unique() if u not in set(units))]:
        order |= dict.fromkeys([unit, *own.loc[own["unit"] == unit, "row"]] if unit in units else [unit])
    values, errors = (
        own.pivot_table(what, "row", "quantity", sort=False, dropna=False, observed=True) for what in ("value", "error")
    )
    table = rows.set_index(LAYER).join(values, how="outer").loc[list(order)]
    return table.rename_axis(LAYER).reset_index(), errors.reindex(list(order)).reset_index(drop=True)


def _owner(name: str, units: Sequence[str]) -> str:
    """Return the layer that a module belongs to: the one with the longest name that begins the module's name."""
    plain = name.partition("#")[0]
    return max((unit for unit in units if f"{plain}.".startswith(f"{unit}.")), key=len, default=name)
