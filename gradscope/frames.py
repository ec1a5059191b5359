"""The tidy frame: one row a layer, target and quantity, with the columns that every part of gradscope agrees on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

SCHEMA_VERSION = 2

COLUMNS: dict[str, str] = {
    "layer": "str",
    "index": "int64",
    "depth_from_output": "int64",
    "target": "str",
    "quantity": "str",
    "value": "float64",
    "log10_value": "float64",
    "log10_stderr_probe": "float64",
    "log10_stderr_sample": "float64",
    "stderr_sample": "float64",
    "reduction": "str",
    "coupled": "boolean",
    "num_probes": "Int64",
    "num_samples": "int64",
}
"""Column name -> pandas dtype.  GSC is in the squared convention.

``log10_value`` is authoritative; ``value`` may be inf or 0 where float64 ends.  A statistic that may be negative (a
mean, a cosine) has no logarithm: its ``log10_value`` is null, ``value`` is authoritative, and its error stands in
``stderr_sample``, which is on the scale of ``value`` and null for coefficients.  A null standard error means that it is
unknown (``num_probes`` is 1, or samples are coupled); ``num_probes == 0`` marks an exact number.  ``index`` counts the
units of the network in execution order (input 0), ``depth_from_output`` the units between a layer and the target (0).
Statistics of a layer by itself have no target, reduction or probes.
"""

NULLABLE = {
    "target", "reduction", "log10_stderr_probe", "log10_stderr_sample", "stderr_sample", "coupled",
    "num_probes",
}  # fmt: skip


def tidy(columns: dict[str, object]) -> pd.DataFrame:
    """A checked frame from columns; ``value`` is filled in from ``log10_value`` where only that is given.

    A scalar stands for all rows.  Each column is made in its own type at once, for `Monitor` makes many small frames.
    """
    logarithms = np.asarray(columns["log10_value"], dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        value = np.power(10.0, logarithms)
    given = {"value": value, "stderr_sample": np.nan, **columns}
    made = {name: _column(given[name], kind, len(logarithms)) for name, kind in COLUMNS.items()}
    return check(pd.DataFrame(made, copy=False))


def _column(given: object, kind: str, num: int) -> object:
    if kind in ("float64", "int64"):
        return np.array(np.broadcast_to(np.asarray(given, dtype=kind), num))
    scalar = given is None or isinstance(given, (str, bool, int))
    values: list[object] = [given] * num if scalar else list(given)  # type: ignore[call-overload]
    return pd.array(values, dtype=kind)  # type: ignore[call-overload]


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame itself if it keeps the schema; further columns (a run's configuration) are welcome.

    Raises:
        ValueError: A column is missing, holds an unexpected null, or values and logarithms contradict each other.
    """
    if missing := [name for name in COLUMNS if name not in frame.columns]:
        raise ValueError(f"The frame lacks the columns {missing}; a tidy frame has {list(COLUMNS)}.")
    signed = frame["stderr_sample"].notna().to_numpy()
    for name in COLUMNS.keys() - NULLABLE:
        bad = frame[name].isna().to_numpy() & ~(signed & (name == "log10_value"))
        if bad.any():
            raise ValueError(f"Column {name!r} holds {int(bad.sum())} nulls, the first at row {frame.index[bad][0]}.")
    with np.errstate(over="ignore", under="ignore"):
        expected = np.power(10.0, frame["log10_value"].to_numpy(dtype=np.float64))
    values = frame["value"].to_numpy(dtype=np.float64)
    logarithmic = ~np.isnan(frame["log10_value"].to_numpy(dtype=np.float64))
    if not np.allclose(values[logarithmic], expected[logarithmic], rtol=1e-9, atol=0):
        raise ValueError("Columns 'value' and 'log10_value' contradict each other.")
    return frame


def save(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a checked frame as ``.parquet`` or ``.csv``, by temporary file and rename, so that no torn file is left."""
    path = Path(path)
    check(frame)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"A frame is saved as .parquet or .csv, got {path.name!r}.")
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False)  # every digit, so that value and log10_value still agree
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # of a full disk, say
        raise


def load(path: str | Path) -> pd.DataFrame:
    """Read a frame that `save` wrote, and check it."""
    path = Path(path)
    if path.suffix == ".parquet":
        frame = pd.read_parquet(path)
    elif path.suffix == ".csv":
        # "none" is a norm and "NA" no null: only an empty field is.
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""])
    else:
        raise ValueError(f"A frame is read from .parquet or .csv, got {path.name!r}.")
    return check(upgraded(frame))


def upgraded(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame as read from a file, of this schema or the one before, in this one's columns and types; not checked."""
    if "stderr_sample" not in frame.columns and "log10_stderr_sample" in frame.columns:  # schema version 1
        frame = frame.assign(stderr_sample=np.nan)
    return frame.astype({name: kind for name, kind in COLUMNS.items() if name in frame.columns})


def to_last_target(rows: pd.DataFrame) -> pd.DataFrame:
    """Of rows of quantity "gsc", those toward their run's last target; runs differ in columns beyond the schema."""
    own = rows["index"].where(rows["depth_from_output"] == 0)
    runs = [rows[name] for name in rows.columns if name not in COLUMNS]
    last = own.groupby(runs, dropna=False, observed=True).transform("max") if runs else own.max()
    return rows[rows["index"] + rows["depth_from_output"] == last]
