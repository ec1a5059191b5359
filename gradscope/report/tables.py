"""Tables of the page: the numbers of a frame, for people, for screen readers, and for whoever reads the page back."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from html import escape
from typing import Any

import numpy as np
import pandas as pd

LAYER = "layer"
MOST_CELLS = 7_000  # of one table with all digits, so that a page stays small enough for an email
MOST_NAMES = 301  # rows, and columns, of a table of all pairs


def thinned(frame: pd.DataFrame, most: int) -> tuple[pd.DataFrame, str]:
    """Return at most ``most`` rows, evenly spread with both ends, and a sentence about it ("" if all rows are kept)."""
    if len(frame) <= most:
        return frame, ""
    kept = np.unique(np.linspace(0, len(frame) - 1, most).round().astype(int))
    return frame.iloc[kept], f"{len(kept)} of {len(frame)} rows are shown, evenly spread, to keep the page small."


def html(frame: pd.DataFrame, caption: str, *, errors: pd.DataFrame | None = None) -> str:
    """Return a frame as an HTML table whose first column names the rows; everything is escaped.

    Numbers are shown with five digits and hold all of them in the attribute ``data-value``.  An unknown number is shown
    as a dash.  ``errors``: standard errors of some columns, under the same names.
    """
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    columns = [
        _cells(frame[name], None if errors is None or name not in errors else errors[name]) for name in frame.columns
    ]
    first = [f'<th scope="row">{escape(str(name))}</th>' for name in frame.iloc[:, 0]]
    body = "".join(f"<tr>{''.join(cells)}</tr>\n" for cells in zip(first, *columns[1:], strict=True))
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cells(values: pd.Series, errors: pd.Series | None) -> list[str]:
    if not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
        return [f"<td>{'' if missing(value) else escape(str(value))}</td>" for value in values]
    spread = [None] * len(values) if errors is None else errors.tolist()
    return [_number_cell(value, error) for value, error in zip(values.tolist(), spread, strict=True)]


def _number_cell(value: Any, error: Any) -> str:
    if missing(value):
        return '<td data-value="">–</td>'
    spread = "" if missing(error) or error == 0 else f" <small>± {number(error, 2)}</small>"
    return f'<td data-value="{value!r}">{number(value)}{spread}</td>'


def missing(value: Any) -> bool:
    """Return whether a cell holds nothing: None, NaN or pandas.NA."""
    return bool(value is None or pd.isna(value))


def number(value: float, digits: int = 5) -> str:
    """Return a number for people, such as ``-1.2346``, ``∞`` or ``unknown``."""
    if missing(value):
        return "unknown"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}".replace("-", "−")


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
            "log10 GSC": gsc["log10_value"].to_numpy(),
            "95 % low": gsc["log10_low"].to_numpy(), "95 % high": gsc["log10_high"].to_numpy(),
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
