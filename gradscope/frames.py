"""The tidy frame: one row a layer, target and quantity, with the columns that every part of gradscope agrees on."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

NETWORK = "network"


SCHEMA_VERSION = 2
# Where a file says which schema it has: in the metadata of Parquet, in a column of CSV, which has nothing else.
METADATA_KEY = b"gradscope_schema"
CSV_COLUMN = "schema_version"
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


class SchemaError(ValueError):
    """A frame is of a schema that this version of gradscope does not know."""


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
    check_values(frame["value"].to_numpy(dtype=np.float64), frame["log10_value"].to_numpy(dtype=np.float64))
    return frame


def check_values(values: npt.NDArray[np.float64], logarithms: npt.NDArray[np.float64]) -> None:
    """See that values are what their logarithms say, where they have one.

    Raises:
        ValueError: They are not.
    """
    logarithmic = ~np.isnan(logarithms)
    found = values[logarithmic]
    with np.errstate(all="ignore"):
        expected = np.power(10.0, logarithms[logarithmic])
        close = (found == expected) | ((np.abs(found - expected) <= 1e-9 * expected) & np.isfinite(expected))
    if not close.all():
        raise ValueError("Columns 'value' and 'log10_value' contradict each other.")


def save(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a checked frame as ``.parquet`` or ``.csv``, by temporary file and rename, so that no torn file is left.

    The file says which schema it has: under `METADATA_KEY` in the metadata of Parquet, in a column of CSV.

    Raises:
        ValueError: The frame does not keep the schema, or the name ends in neither.
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
        else:  # every digit, so that value and log10_value still agree
            frame.assign(**{CSV_COLUMN: SCHEMA_VERSION}).to_csv(temporary, index=False)
        return temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # of a full disk, say
        raise


def beside(path: Path) -> Path:
    """A temporary name for a file, of this process of this machine only, so that no two of them tear it."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")


def load(path: str | Path) -> pd.DataFrame:
    """Read a frame that `save` wrote, of this schema or an older one, and check it.

    Raises:
        SchemaError: It is of a schema that is not known here.
        ValueError: It does not keep its schema, or the name ends in neither ``.parquet`` nor ``.csv``.
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
    return check(upgraded(frame))


def version_of(schema: pa.Schema) -> str | None:
    """The schema that a Parquet file says it has; None in files from before they said so, which are of 1 or 2."""
    words = (schema.metadata or {}).get(METADATA_KEY)
    return None if words is None else words.decode()


def check_version(version: object, path: Path) -> None:
    """See that a file's schema is known here; None is.

    Raises:
        SchemaError: It is not.
    """
    if version is None or str(version) in map(str, range(1, SCHEMA_VERSION + 1)):
        return
    raise SchemaError(
        f"{path} is a frame of schema {version}, and this version of gradscope reads 1 to {SCHEMA_VERSION}: "
        "read it with the version that wrote it, or make the run again (rerun=true)."
    )


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
    """Numbers that are no coefficients, of any sign, as rows of a tidy frame.

    Arguments:
        quantity: Their name, in lower_case.
        values: One or many; they stand in ``value`` and have no logarithm.  Infinite where a number overflowed.
        layer, index: What they are of; one for all rows, or one a row.
        stderr: Standard errors on the scale of the values, 0 where exact.
        num_samples: Samples that each value was taken from.
        columns: What else tells the rows apart (step, shift, ...), one for all rows, or one a row.
    """
    value = np.atleast_1d(np.asarray(values, dtype=np.float64))
    frame = tidy(
        {
            "layer": [layer] * len(value) if isinstance(layer, str) else list(layer),
            "index": np.broadcast_to(np.asarray(index), len(value)),
            "depth_from_output": 0,
            "target": None,
            "quantity": quantity,
            "value": value,
            "log10_value": np.full(len(value), np.nan),
            "log10_stderr_probe": np.nan,
            "log10_stderr_sample": np.nan,
            "stderr_sample": np.broadcast_to(np.asarray(stderr, dtype=np.float64), len(value)),
            "reduction": None,
            "coupled": None,
            "num_probes": 0,
            "num_samples": num_samples,
        }
    )
    return frame.assign(**columns)
