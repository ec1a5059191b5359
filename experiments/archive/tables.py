"""One table for many runs: a folder of Parquet files, partitioned by model.  Column ``run``: name of the run's folder.

The files are read with Arrow, because pandas takes eight times as long for a small file.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gradscope import frames

RUN, MODEL = "run", "model"
ARROW = {"str": pa.large_string(), "int64": pa.int64(), "Int64": pa.int64(), "float64": pa.float64(),
         "boolean": pa.bool_()}  # fmt: skip
WITHOUT_NULLS = [name for name in frames.COLUMNS if name not in frames.NULLABLE and name != "log10_value"]


def read_part(path: Path, run: str) -> pa.Table:
    """The table of one run.  ValueError if the file is not complete Parquet or has no column ``model``."""
    return _of_run(pq.ParquetFile(path), run)


def read_frame(path: Path, run: str) -> pa.Table:
    """The tidy frame of one run, checked as in `frames.load`, but in a tenth of the time."""
    file = pq.ParquetFile(path)
    frames.check_version(frames.version_of(file.schema_arrow), path)
    table = _of_run(file, run)
    names = table.column_names
    if missing := [name for name in frames.COLUMNS if name not in names]:
        raise ValueError(f"It lacks the columns {missing}.")
    types = dict(zip(names, table.schema.types, strict=True))
    for name in [name for name in frames.SCHEMA if name in names]:
        if types[name] != (kind := ARROW[frames.SCHEMA[name]]):
            table = table.set_column(names.index(name), name, table[name].cast(kind))
    wanted = ("value", "log10_value", "stderr_sample", *frames.OPTIONAL)
    numbers = {name: table[name].to_numpy() for name in wanted if name in names}
    holes = [name for name in WITHOUT_NULLS if table[name].null_count]
    signed = ~np.isnan(numbers["stderr_sample"]) | table["target"].is_null().to_numpy()
    unknown = np.isnan(numbers["log10_value"]) & ~signed
    if np.isnan(numbers["value"]).any() or unknown.any() or holes:
        raise ValueError(f"It has nulls in columns that allow none ({', '.join(holes) or 'value or log10_value'}).")
    frames.check_values(numbers)
    return table


def _of_run(file: pq.ParquetFile, run: str) -> pa.Table:
    table = file.read(use_threads=False).replace_schema_metadata(None)
    if MODEL not in table.column_names:
        raise ValueError(f"It lacks the column {MODEL!r}.")
    return table.append_column(RUN, pa.repeat(run, len(table)).cast(pa.large_string()))


def update(folder: Path, parts: Sequence[pa.Table], kept: set[str]) -> None:
    """Write a data set: the old rows of the runs in ``kept``, and the new parts.  `recover` undoes a killed update."""
    recover(folder)
    before = [_table(folder)] if folder.is_dir() else []
    old_rows = [table.filter(pc.is_in(table[RUN], pa.array(sorted(kept), table[RUN].type))) for table in before]
    tables = [table for table in (*old_rows, *parts) if len(table)]
    temporary, old = _part(folder), _old(folder)
    if tables:
        # Without `combine_chunks`, each run would become a row group, and files with many row groups are slow to read.
        pq.write_to_dataset(_together(tables).combine_chunks(), temporary, partition_cols=[MODEL])
    if folder.is_dir():
        folder.rename(old)
    if tables:
        temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Restore the data set after a killed update.  A data set with an unreadable file is removed."""
    shutil.rmtree(_part(folder), ignore_errors=True)
    if _old(folder).is_dir() and not folder.is_dir():
        _old(folder).rename(folder)
    shutil.rmtree(_old(folder), ignore_errors=True)
    try:
        for path in folder.rglob("*.parquet"):
            pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        shutil.rmtree(folder)


def load(folder: Path) -> pd.DataFrame | None:
    """The data set as a frame; None if there is none."""
    return _table(folder).to_pandas() if folder.is_dir() else None


def _together(tables: Sequence[pa.Table]) -> pa.Table:
    """The rows of all tables.  Columns that a table lacks are null there; columns of mixed types become strings."""
    with contextlib.suppress(pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.concat_tables(tables, promote_options="permissive")
    types: dict[str, set[pa.DataType]] = {}
    for field in (field for table in tables for field in table.schema):
        types.setdefault(field.name, set()).add(field.type)
    mixed = {name for name, of in types.items() if not _promotable(of)}
    cast = [
        table.cast(pa.schema([field.with_type(pa.large_string()) if field.name in mixed else field
                              for field in table.schema]))
        for table in tables
    ]  # fmt: skip
    return pa.concat_tables(cast, promote_options="permissive")


def _promotable(types: set[pa.DataType]) -> bool:
    try:
        pa.unify_schemas([pa.schema([("", one)]) for one in types], promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return False
    return True


def _part(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.part")


def _old(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.old")


def _table(folder: Path) -> pa.Table:
    table = pq.read_table(folder)
    position = table.schema.get_field_index(MODEL)
    return table.set_column(position, MODEL, table[MODEL].cast(pa.large_string()))


@dataclass(frozen=True, eq=False)  # hashed by identity, so that studies can cache what they read from a frame
class Collected:
    """All finished runs of a sweep: a tidy frame, a table of training records (or None), and a common manifest."""

    frame: pd.DataFrame
    metrics: pd.DataFrame | None
    manifest: dict[str, Any]
