"""The tidy frame: one row per layer, target and quantity, with the columns that all parts of gradscope share."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

NETWORK = "network"

SCHEMA_VERSION = 2
METADATA_KEY, CSV_COLUMN = b"gradscope_schema", "schema_version"  # where Parquet and CSV files state their schema
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
"""Required columns: name -> pandas dtype.  GSC is in the squared convention.

``log10_value`` is authoritative; ``value`` may be inf or 0 beyond the range of float64.  A statistic that can be
negative (a mean, a cosine) has no logarithm: ``log10_value`` is null, ``value`` is authoritative, and its error is
``stderr_sample``, on the scale of ``value``.  A null standard error is unknown (``num_probes`` is 1, or samples are
coupled); ``num_probes == 0`` marks an exact number.  ``index`` counts the units of the network in execution order
(input 0), ``depth_from_output`` the units between a layer and the target (0).  Statistics of a single layer have no
target, reduction or probes.
"""
OPTIONAL = {"log10_low": "float64", "log10_high": "float64"}
"""Columns that a frame may have: ends of the 95 % interval of ``log10_value``, null where it is unknown."""
SCHEMA = COLUMNS | OPTIONAL
NULLABLE = {
    "target", "reduction", "log10_stderr_probe", "log10_stderr_sample", "stderr_sample", "coupled", "num_probes",
}  # fmt: skip
DEFAULTS: dict[str, Any] = dict.fromkeys(NULLABLE) | {"num_probes": 0}
ROUNDING = 1e-4  # of the ends of an interval, in files of a few digits


class SchemaError(ValueError):
    """A file was written with a schema that this version of gradscope does not read."""


def tidy(columns: Mapping[str, Any]) -> pd.DataFrame:
    """Return a checked frame made of columns; a scalar stands for all rows.

    Arguments:
        columns: Values by name of `COLUMNS` or `OPTIONAL`.  Of ``value`` and ``log10_value`` one may be missing: the
            value follows from the logarithm, and a value without a logarithm leaves that null.  Target, reduction,
            coupling and standard errors are null by default, ``num_probes`` 0.

    >>> import gradscope as gs
    >>> columns = {"layer": ["a", "b"], "index": [1, 2], "depth_from_output": [1, 0], "num_samples": 8}
    >>> frame = gs.frames.tidy({**columns, "quantity": "width_ratio", "log10_value": [1.0, 0.0]})
    >>> frame[["layer", "quantity", "value"]]
      layer     quantity  value
    0     a  width_ratio   10.0
    1     b  width_ratio    1.0
    """
    logarithms = np.asarray(columns.get("log10_value", np.nan), dtype=np.float64)
    with np.errstate(over="ignore", under="ignore"):
        values = np.asarray(columns.get("value", np.power(10.0, logarithms)), dtype=np.float64)
    num = np.broadcast(np.atleast_1d(values), np.atleast_1d(logarithms)).size
    given = {**DEFAULTS, **columns, "value": values, "log10_value": logarithms}
    names = [*COLUMNS, *(name for name in OPTIONAL if name in columns)]
    # Each column is made in its final type at once: `Monitor` makes many small frames.
    return check(pd.DataFrame({name: _column(given[name], SCHEMA[name], num) for name in names}, copy=False))


def _column(given: Any, kind: str, num: int) -> object:
    if kind in ("float64", "int64"):
        return np.array(np.broadcast_to(np.asarray(given, dtype=kind), num))
    values = [given] * num if given is None or isinstance(given, (str, bool, int)) else list(given)
    return pd.array(values, dtype=kind)  # type: ignore[call-overload]


def observed(
    quantity: str,
    values: npt.ArrayLike,
    *,
    layer: str | Sequence[str] = NETWORK,
    index: npt.ArrayLike = 0,
    stderr: npt.ArrayLike = 0.0,
    num_samples: int = 1,
    **columns: Any,
) -> pd.DataFrame:
    """Return numbers of any sign that are not coefficients as rows of a tidy frame.

    Arguments:
        quantity: Name of the numbers, in lower_case.
        values: One or many numbers, kept in ``value`` without a logarithm; inf where a number overflowed.
        layer, index: What the numbers describe; one for all rows, or one per row.
        stderr: Standard errors on the scale of the values, 0 where exact.
        num_samples: Samples that each value was computed from.
        columns: Further columns that tell the rows apart (step, shift, ...); one for all rows, or one per row.

    >>> import gradscope as gs
    >>> gs.frames.observed("balance", [-1.0, 2.0], index=[1, 2], step=5)[["layer", "index", "value", "step"]]
         layer  index  value  step
    0  network      1   -1.0     5
    1  network      2    2.0     5
    """
    value = np.atleast_1d(np.asarray(values, dtype=np.float64))
    about = {"layer": layer, "index": index, "depth_from_output": 0, "num_samples": num_samples}
    return tidy({**about, "quantity": quantity, "value": value, "stderr_sample": stderr}).assign(**columns)


def check(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame unchanged if it follows the schema; additional columns are allowed.

    Raises:
        ValueError: A column is missing or holds an unexpected null, or values, logarithms and intervals contradict
            each other.

    >>> import gradscope as gs
    >>> gs.frames.check(gs.frames.observed("balance", 1.0).drop(columns="target"))
    Traceback (most recent call last):
    ValueError: The frame lacks the columns ['target'] of a tidy frame (gradscope.frames.COLUMNS).
    """
    if missing := [name for name in COLUMNS if name not in frame.columns]:
        raise ValueError(f"The frame lacks the columns {missing} of a tidy frame (gradscope.frames.COLUMNS).")
    signed = frame["stderr_sample"].notna().to_numpy()
    for name in COLUMNS.keys() - NULLABLE:
        bad = frame[name].isna().to_numpy() & ~(signed & (name == "log10_value"))
        if bad.any():
            raise ValueError(f"Column {name!r} holds {int(bad.sum())} nulls, the first at row {frame.index[bad][0]}.")
    names = ("value", "log10_value", *(name for name in OPTIONAL if name in frame.columns))
    check_values({name: frame[name].to_numpy(dtype=np.float64) for name in names})
    return frame


def check_values(columns: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Raise ValueError unless values agree with their logarithms and intervals contain them."""
    logarithms = columns["log10_value"]
    logarithmic = ~np.isnan(logarithms)
    found = columns["value"][logarithmic]
    with np.errstate(all="ignore"):
        expected = np.power(10.0, logarithms[logarithmic])
        close = (found == expected) | ((np.abs(found - expected) <= 1e-9 * expected) & np.isfinite(expected))
    if not close.all():
        raise ValueError("Columns 'value' and 'log10_value' contradict each other.")
    low, high = columns.get("log10_low", logarithms), columns.get("log10_high", logarithms)
    if (low > logarithms + ROUNDING).any() or (high < logarithms - ROUNDING).any():
        raise ValueError("Columns 'log10_low' and 'log10_high' do not contain 'log10_value'.")


def save(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a checked frame as ``.parquet`` or ``.csv`` and return the path; a killed process leaves no partial file.

    Raises:
        ValueError: The frame violates the schema, or the name has another ending.

    >>> import tempfile, gradscope as gs
    >>> frame = gs.frames.observed("balance", 1.0)
    >>> path = gs.frames.save(frame, tempfile.mkdtemp() + "/frame.parquet")
    >>> gs.frames.load(path).equals(frame)
    True
    """
    path = Path(path)
    check(frame)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"A frame is saved as .parquet or .csv, got {path.name!r}.")
    temporary = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if path.suffix == ".parquet":
            table = pa.Table.from_pandas(frame, preserve_index=False)
            metadata = {**table.schema.metadata, METADATA_KEY: str(SCHEMA_VERSION)}
            pq.write_table(table.replace_schema_metadata(metadata), temporary)
        else:  # all digits, so that value and log10_value still agree
            frame.assign(**{CSV_COLUMN: SCHEMA_VERSION}).to_csv(temporary, index=False)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # after a full disk, for example
        raise


def beside(path: Path) -> Path:
    """Return a temporary file name unique to this process and machine, so that writers do not overwrite each other."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def load(path: str | Path) -> pd.DataFrame:
    """Return the checked frame of a file that `save` wrote.

    Raises:
        SchemaError: The file was written with another version of the schema.
        ValueError: The contents violate the schema, or the name ends in neither ``.parquet`` nor ``.csv``.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        table = pq.ParquetFile(path).read()
        frame, version = table.to_pandas(), version_of(table.schema)
    elif path.suffix == ".csv":
        # "none" is a norm, "NA" and "1.10" are names: only an empty field is null.
        names = {name: kind for name, kind in COLUMNS.items() if kind == "str"}
        frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names)
        version = frame.pop(CSV_COLUMN).max() if CSV_COLUMN in frame else None
    else:
        raise ValueError(f"A frame is read from .parquet or .csv, got {path.name!r}.")
    check_version(version, path)
    return check(typed(frame))


def version_of(schema: pa.Schema) -> str | None:
    """Return the schema version that a Parquet file states, or None."""
    words = (schema.metadata or {}).get(METADATA_KEY)
    return None if words is None else words.decode()


def check_version(version: object, path: Path) -> None:
    """Raise SchemaError unless the file states the schema of this version of gradscope."""
    if str(version) != str(SCHEMA_VERSION):
        raise SchemaError(
            f"{path} was made by another version of gradscope (schema {version}; this one reads {SCHEMA_VERSION}): "
            "run again (rerun=true)."
        )


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame as read from a file with the column types of the schema; not checked."""
    return frame.astype({name: kind for name, kind in SCHEMA.items() if name in frame.columns})


def to_last_target(rows: pd.DataFrame) -> pd.DataFrame:
    """Return those rows of quantity "gsc" whose target is the last of their run; runs differ in additional columns."""
    own = rows["index"].where(rows["depth_from_output"] == 0)
    runs = [rows[name] for name in rows.columns if name not in SCHEMA]
    last = own.groupby(runs, dropna=False, observed=True).transform("max") if runs else own.max()
    return rows[rows["index"] + rows["depth_from_output"] == last]
