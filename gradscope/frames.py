"""The tidy frame: one row per layer, target and quantity, with the columns that all parts of gradscope share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from gradscope import files
from gradscope.choices import Numbers, PathLike, Size, checked, listed, require, shown
from gradscope.files import written

__all__ = ["SchemaError", "check", "load", "observed", "save", "tidy", "to_last_target"]

NETWORK = "network"
SCHEMA_VERSION = 2
METADATA_KEY, CSV_COLUMN = b"gradscope_schema", "schema_version"  # hold the schema version of a file
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

``log10_value`` is valid at every scale; ``value`` may be inf or 0 beyond the range of float64.  A statistic that can
be negative (a mean, a cosine) has no logarithm: ``log10_value`` is null, and ``stderr_sample`` is the standard error
of ``value``.  A standard error is null if it is unknown, for example with one probe or too few samples.
``num_probes == 0`` marks an exact number.  ``index`` is the place of a unit in execution order (0 for the input).
``depth_from_output`` is the number of units from a layer to the target (0 for the target).  Statistics of a single
layer have no target, reduction or probes.
"""
OPTIONAL = {"log10_low": "float64", "log10_high": "float64"}
"""Optional columns: both ends of the 95 % interval of ``log10_value``; null if the interval is unknown."""
FLAGS = {"on_trunk": "boolean"}  # optional: whether every path from the input to the target passes through the layer
SCHEMA = COLUMNS | OPTIONAL | FLAGS
TEXT = {name: kind for name, kind in COLUMNS.items() if kind == "str"}  # never read as numbers: "1.10" is a name
NULLABLE = {
    "target", "reduction", "log10_stderr_probe", "log10_stderr_sample", "stderr_sample", "coupled", "num_probes",
}  # fmt: skip
DEFAULTS: dict[str, Any] = dict.fromkeys(NULLABLE) | {"num_probes": 0}
ROUNDING = 1e-4  # tolerance for the ends of an interval, which a file may hold with a few digits only


class SchemaError(ValueError):
    """Raised if a file was written with a schema version that this version of gradscope cannot read.

    >>> check_version(1, Path("old.csv"))  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    SchemaError: old.csv has schema version 1, but this version of gradscope reads 2: measure again (rerun=true).
    """


@checked
def tidy(columns: Mapping[str, Any]) -> pd.DataFrame:
    """Return a tidy frame with the given columns, after a check.

    Arguments:
        columns: Values by column (`COLUMNS`, `OPTIONAL`, `FLAGS`), one per row or one for all rows.  Needed: ``layer``,
            ``index``, ``depth_from_output``, ``quantity``, ``num_samples``, and ``value`` or ``log10_value``.
            By default, ``value`` is 10^log10_value, ``num_probes`` is 0, and the other `COLUMNS` are null.

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
    if missing := [name for name in COLUMNS if name not in given]:
        raise ValueError(f"columns lacks {listed(missing)}, which each tidy frame needs.")
    names = [*COLUMNS, *(name for name in (*OPTIONAL, *FLAGS) if name in columns)]
    # Create each column directly with its final type, which is faster: `Monitor` makes many small frames.
    return check(pd.DataFrame({name: _column(name, given[name], num) for name in names}, copy=False))


def _column(name: str, given: Any, num: int) -> object:
    kind = SCHEMA[name]
    try:
        return _array(given, kind, num)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Column {name!r} must hold {num} values of type {kind}, got {shown(given)}.") from error


def _array(given: Any, kind: str, num: int) -> object:
    if kind in ("float64", "int64"):
        return np.array(np.broadcast_to(np.asarray(given, dtype=kind), num))
    values = [given] * num if given is None or isinstance(given, (str, bool, int)) else list(given)
    if len(values) != num:
        raise ValueError
    return pd.array(values, dtype=kind)  # type: ignore[call-overload]


@checked
def observed(
    quantity: str | Sequence[str],
    values: Numbers,
    *,
    layer: str | Sequence[str] = NETWORK,
    index: Numbers = 0,
    stderr: Numbers | Sequence[float | None] = 0.0,
    num_samples: Size = 1,
    **columns: Any,
) -> pd.DataFrame:
    """Return a tidy frame of numbers that may have any sign, such as losses; they are stored without a logarithm.

    Arguments:
        quantity: Name of the quantity, in lower_case; one for all rows, or one per row.
        values: One number or several, stored in column ``value``; inf if a number overflowed.
        layer, index: Name and index of the layer; one for all rows, or one per row.
        stderr: Standard errors of the values; 0 for exact values, None or NaN for unknown errors.
        num_samples: Number of samples from which each value was computed.
        columns: Further columns that distinguish the rows (step, shift, ...); one value for all rows, or one per row.

    >>> import gradscope as gs
    >>> gs.frames.observed("balance", [-1.0, 2.0], index=[1, 2], step=5)[["layer", "index", "value", "step"]]
         layer  index  value  step
    0  network      1   -1.0     5
    1  network      2    2.0     5
    """
    value = np.atleast_1d(np.asarray(values, dtype=np.float64))
    about = {"layer": layer, "index": index, "depth_from_output": 0, "num_samples": num_samples}
    for name, given in columns.items():
        shape = () if isinstance(given, str) or not isinstance(given, Sized) else np.shape(np.asarray(given))
        if shape[:1] not in ((), value.shape):
            raise ValueError(f"Column {name!r} must hold one value or {len(value)}, got {shown(given)}.")
    return tidy({**about, "quantity": quantity, "value": value, "stderr_sample": stderr}).assign(**columns)


@checked
def check(frame: pd.DataFrame) -> pd.DataFrame:
    """Check that a frame is a valid tidy frame, and return it unchanged; additional columns are allowed.

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
    require(frame, list(frame.columns), "gradscope.frames.tidy")
    # Statistics of a single layer have no target, and those that can be negative have no logarithm.
    signed = (frame["stderr_sample"].notna() | frame["target"].isna()).to_numpy()
    for name in COLUMNS.keys() - NULLABLE:
        bad = frame[name].isna().to_numpy() & ~(signed & (name == "log10_value"))
        if bad.any():
            raise ValueError(f"Column {name!r} holds {int(bad.sum())} nulls, the first at row {frame.index[bad][0]}.")
    names = ("value", "log10_value", *(name for name in OPTIONAL if name in frame.columns))
    check_values({name: frame[name].to_numpy(dtype=np.float64) for name in names})
    return frame


def check_values(columns: Mapping[str, npt.NDArray[np.float64]]) -> None:
    """Raise ValueError unless every value agrees with its logarithm and every interval contains its logarithm."""
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


@checked
def save(frame: pd.DataFrame, path: PathLike) -> Path:
    """Check a tidy frame, write it atomically as ``.parquet`` or ``.csv``, and return the path.

    Raises:
        ValueError: The frame violates the schema, or the name ends in neither ``.parquet`` nor ``.csv``.

    >>> import tempfile, gradscope as gs
    >>> frame = gs.frames.observed("balance", 1.0)
    >>> path = gs.frames.save(frame, tempfile.mkdtemp() + "/frame.parquet")
    >>> gs.frames.load(path).equals(frame)
    True
    """
    path = Path(path)
    check(frame)
    if path.suffix not in (".parquet", ".csv"):
        raise ValueError(f"A frame is saved as .parquet or .csv, got {shown(path.name)}.")
    if path.suffix == ".csv":  # writes all digits, so that value and log10_value agree when read
        table = frame.assign(**{CSV_COLUMN: SCHEMA_VERSION})
        return written(path, lambda temporary: table.to_csv(temporary, index=False))
    columns = pa.Table.from_pandas(frame, preserve_index=False)
    metadata = {**columns.schema.metadata, METADATA_KEY: str(SCHEMA_VERSION)}
    return written(path, lambda temporary: pq.write_table(columns.replace_schema_metadata(metadata), temporary))


@checked
def load(path: PathLike) -> pd.DataFrame:
    """Read a file that `save` wrote, and return the tidy frame after a check.  No code in the file is ever run.

    Raises:
        SchemaError: The file was written with another version of the schema.
        ValueError: The contents are damaged or violate the schema, or the name ends in neither ``.parquet`` nor
            ``.csv``, or the frame would take more than 256 MB of memory.  The environment variable GRADSCOPE_READ_MB
            sets another limit in MB.

    >>> import tempfile
    >>> load(save(observed("loss", 2.0), Path(tempfile.mkdtemp()) / "loss.csv"))["value"].tolist()
    [2.0]
    """
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            table = files.read_parquet(path)
            version, frame = version_of(table.schema), table.to_pandas()
        elif path.suffix == ".csv":
            frame = files.read_csv(path, TEXT)
            version = frame.pop(CSV_COLUMN).max() if CSV_COLUMN in frame else None
        else:
            raise ValueError(f"A frame is read from .parquet or .csv, got {shown(path.name)}.")
        check_version(version, path)
        return check(typed(frame))
    except (ValueError, OSError):
        raise
    except Exception as error:  # damaged bytes can raise nearly any exception
        raise ValueError(f"{path} is not a frame ({type(error).__name__}: {error}).") from error


def version_of(schema: pa.Schema) -> str | None:
    """Return the schema version that a Parquet file states, or None."""
    words = (schema.metadata or {}).get(METADATA_KEY)
    return None if words is None else words.decode()


def check_version(version: object, path: Path) -> None:
    """Raise SchemaError unless the file states the schema of this version of gradscope."""
    if str(version) != str(SCHEMA_VERSION):
        raise SchemaError(
            f"{path} has schema version {version}, but this version of gradscope reads {SCHEMA_VERSION}: measure again "
            "(rerun=true)."
        )


def typed(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a frame that was read from a file, converted to the column types of the schema but not checked."""
    files.check_names([str(name) for name in frame.columns])
    for name in [name for name, kind in SCHEMA.items() if name in frame.columns and kind in ("int64", "Int64")]:
        if pd.api.types.is_float_dtype(frame[name]) and not ((number := frame[name].dropna()) == number.round()).all():
            raise ValueError(f"Column {name!r} holds numbers that are not whole.")
    return frame.astype({name: kind for name, kind in SCHEMA.items() if name in frame.columns})


def notebook(text: str, table: pd.DataFrame) -> str:
    """Return a text and at most 24 rows of a table as HTML for notebooks, for ``_repr_html_`` of results.

    Columns that hold nothing are left out.

    >>> notebook("a < b", pd.DataFrame({"layer": ["a"]}))[:23]
    '<pre>a &lt; b</pre><tab'
    """
    table = table.drop(columns=[name for name in table if (table[name].isna() | (table[name].astype(str) == "")).all()])
    rows = table.to_html(index=False, max_rows=24, max_cols=12, float_format="{:.3f}".format, na_rep="")
    return f"<pre>{escape(text)}</pre>{rows}"


@checked
def to_last_target(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for each run, the rows with the target nearest the output.  Additional columns tell runs apart.

    >>> to_last_target(observed("gsc", [1.0, 2.0], layer=["a", "b"], index=[1, 2]))["layer"].tolist()
    ['b']
    """
    require(rows, ["index", "depth_from_output"], "gradscope.gsc(model, data).to_frame()")
    own = rows["index"].where(rows["depth_from_output"] == 0)
    runs = [rows[name] for name in rows.columns if name not in SCHEMA]
    last = own.groupby(runs, dropna=False, observed=True).transform("max") if runs else own.max()
    return rows[rows["index"] + rows["depth_from_output"] == last]
